"""Values and tables as plain lines of text."""

import itertools
import textwrap
from collections.abc import Sequence


def size(value: float) -> str:
    """Bytes with three digits and their unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} PB"


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most `width` columns; a word that is longer than a line is cut."""
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return lines or [""]


def table(
    rows: Sequence[Sequence[str]], *, align: str, width: int, flexible: int, gap: str = "  ", indent: str = ""
) -> list[list[str]]:
    """The lines of each row, every column as wide as its widest cell.

    `align` has a letter a column, < or >. Where the table would be wider than `width`, the column `flexible` wraps.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    others = len(indent) + sum(widths) - widths[flexible] + len(gap) * (len(widths) - 1)
    widths[flexible] = max(1, min(widths[flexible], width - others))
    lines = []
    for row in rows:
        cells = [wrap(cell, widths[flexible]) if i == flexible else [cell] for i, cell in enumerate(row)]
        padded = [
            [f"{cell:{side}{columns}}" for cell, side, columns in zip(line, align, widths, strict=True)]
            for line in itertools.zip_longest(*cells, fillvalue="")
        ]
        lines.append([(indent + gap.join(line)).rstrip() for line in padded])
    return lines
