"""Progress and tables on the terminal and JSON lines, each with the machine and software that it was measured on."""

import datetime
import importlib.metadata
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measure import FLOOR, Row
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).parent
WIDE_COLUMNS = 120  # a terminal narrower than this gets a table without lines and configurations


def output_of(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    except OSError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def environment(commit: str | None = None) -> dict[str, str | None]:
    """What every JSON row says about its origin; `commit` for a checkout without its history."""
    script = Path(sys.argv[0])
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    return {
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "driver": output_of(query),
        "torch": torch.__version__,
        "commit": commit or source_version(["git", "describe", "--always", "--dirty", "--exclude=*"]),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{script.name}", *measured_by(sys.argv[1:])]),
    }


def measured_by(arguments: Sequence[str]) -> list[str]:
    """Those that say what is measured: not where it is written, nor which commit it is."""
    return [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if not {before, word} & {"--json", "--plot", "--commit"}
    ]


def source_version(git: list[str]) -> str | None:
    """What git says of this checkout; of an installed package, its version."""
    if (HERE.parent / "pyproject.toml").is_file():
        return output_of(git)
    return f"mla_fp8 {importlib.metadata.version('mla_fp8')}"


def again(options: Mapping[str, object]) -> str:
    """The command that measures one table again: its contenders take turns, so none is measured alone."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", "mla_fp8", "bench", *words])


def progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def origin(facts: Mapping[str, str | None]) -> str:
    """One line under a table."""
    return ", ".join(f"{key} {facts[key]}" for key in ("gpu", "driver", "torch", "commit", "date"))


def write_json(path: Path, rows: Iterable[Row | dict[str, Any]], facts: Mapping[str, str | None]) -> None:
    lines = [json.dumps({**(row if isinstance(row, dict) else asdict(row)), **facts}) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"


def microseconds(value: float | None) -> str:
    """Three or four significant digits."""
    return (
        "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
    )


def table(title: str, rows: Sequence[Row], where: str, narrow: bool = False) -> Table:
    """One case: a line a contender, the fastest first; what did not run comes last, with the reason."""
    own = next((row for row in rows if row.ours and row.us is not None), None)
    style: dict[str, Any] = {"box": None, "padding": (0, 2, 0, 0), "pad_edge": False} if narrow else {}
    table = Table(title=title, title_justify="left", caption=where, caption_justify="left", **style)
    for column in ("contender", "µs", "p20", "p80", "GB/s", "% of stream", "over floor", "over ours"):
        heading = column.replace("over ", "over\n").replace("% of ", "% of\n") if narrow else column
        table.add_column(heading, justify="left" if column == "contender" else "right", overflow="fold")
    for row in sorted(rows, key=lambda row: row.us if row.us is not None else float("inf")):
        name = (
            f"{row.contender} ({row.config})" if row.config and row.contender != FLOOR and not narrow else row.contender
        )
        if row.us is None:
            table.add_row(f"{name}: {row.status}{': ' if row.reason else ''}{row.reason}", *[""] * 7, style="dim")
            continue
        over_own = row.us / own.us if own is not None and own.us is not None else None
        cells = [microseconds(row.us), microseconds(row.us_p20), microseconds(row.us_p80), number(row.gbps, 0)]
        cells += [number(row.percent_of_stream, 1), number(row.over_floor, 2, "x"), number(over_own, 2, "x")]
        table.add_row(name, *cells, style="bold" if row.ours else "cyan" if row.contender == FLOOR else "")
    return table


def show(console: Console, rows: Sequence[Row], where: str = "") -> None:
    first = rows[0]
    title, narrow = f"{first.side}, S = {first.s}, H = {first.heads}", console.width < WIDE_COLUMNS
    console.print(table(title, rows, where, narrow))
    if first.reproduce:
        console.print(f"again: {first.reproduce}\n", style="dim", markup=False, highlight=False, soft_wrap=True)
