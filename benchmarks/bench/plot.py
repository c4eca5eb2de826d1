"""Time over S, and the fraction of the floor's speed: a row of two panels a side.

python -m benchmarks.bench.plot results.json plot.svg    from what benchmarks/gpu.py --json wrote
"""

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import FLOOR, Row
from .report import read
from .sides import SIDES

FAMILIES = {  # colour of the contenders whose name contains the key; the first that fits
    "mla_fp8": "#c1272d",
    "FlashInfer": "#009e73",
    "DeepGEMM": "#e69f00",
    "humming": "#56b4e9",
    "Triton": "#9467bd",
    "torch.bmm": "#0072b2",
}
OTHER_COLOR, FLOOR_COLOR = "#7f7f7f", "#222222"
LINE_STYLES = ("-", "--", ":", "-.")  # within a family, in the order of the rows
TIME_TICKS = [base * 10.0**power for power in range(-4, 6) for base in (1, 2, 5)]


def canvas(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """matplotlib's figure and axes, drawn to files alone; the same rows give the same file."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mla_fp8"
    matplotlib.rcParams["svg.fonttype"] = "none"
    return importlib.import_module("matplotlib.pyplot").subplots(rows, columns, **options)  # type: ignore[no-any-return]


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)
    importlib.import_module("matplotlib.pyplot").close(figure)


def finish(axis: Any) -> None:
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """An SVG or PNG a number of heads; with several, `-h16` and so on is put before the suffix."""
    all_heads = sorted({row.heads for row in rows})
    for heads in all_heads:
        target = path if len(all_heads) == 1 else path.with_stem(f"{path.stem}-h{heads}")
        save(_figure([row for row in rows if row.heads == heads and row.us is not None], heads), target)


def _figure(rows: Sequence[Row], heads: int) -> Any:
    sides = [name for name in SIDES if any(row.side == name for row in rows)]
    figure, axes = canvas(len(sides), 2, figsize=(13, 4.1 * len(sides)), squeeze=False)
    for (times, fractions), side in zip(axes, sides, strict=True):
        of_side = [row for row in rows if row.side == side]
        for contender, style in _styles(of_side).items():
            line = sorted((row for row in of_side if row.contender == contender), key=lambda row: row.s)
            times.plot([row.s for row in line], [row.us for row in line], label=contender, **style)
            line = [row for row in line if row.over_floor and contender != FLOOR]
            fractions.plot([row.s for row in line], [100 / (row.over_floor or 1) for row in line], **style)
        fractions.axhline(100, color=FLOOR_COLOR, linewidth=1, linestyle="--")
        _show_times(times, [row.us or 0 for row in of_side])
        times.set(title=SIDES[side].title, ylabel="µs")
        fractions.set(title="% of the floor's speed", ylim=(0, 115))
        times.legend(fontsize=8, frameon=False, loc="upper left")
        for axis in (times, fractions):
            _show_tokens(axis, sorted({row.s for row in of_side}))
    figure.suptitle(f"H = {heads}, cold L2. Floor: one launch that moves the same bytes and computes nothing.", y=1.0)
    figure.tight_layout()
    return figure


def draw_cpu(path: Path, rows: Sequence[Any]) -> None:
    """One panel an op and number of heads, ms over S, from the rows of benchmarks/cpu.py."""
    panels = list(dict.fromkeys((row.op, row.heads) for row in rows))
    figure, axes = canvas(1, len(panels), figsize=(6.5 * len(panels), 4.1), squeeze=False)
    for axis, (op, heads) in zip(axes[0], panels, strict=True):
        of_panel = [row for row in rows if (row.op, row.heads) == (op, heads)]
        for contender, style in _styles(of_panel).items():
            line = sorted((row for row in of_panel if row.contender == contender), key=lambda row: row.s)
            axis.plot([row.s for row in line], [row.ms for row in line], label=contender, **style)
        _show_times(axis, [row.ms for row in of_panel])
        axis.set(title=f"{op}, H = {heads}", ylabel="ms")
        axis.legend(fontsize=8, frameon=False, loc="upper left")
        _show_tokens(axis, sorted({row.s for row in of_panel}))
    figure.tight_layout()
    save(figure, path)


def _show_times(axis: Any, times: Sequence[float]) -> None:
    axis.set_yscale("log")
    lowest, highest = min(times), max(times)
    ticks = [tick for tick in TIME_TICKS if lowest / 1.3 <= tick <= highest * 1.3]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ylim(lowest / 1.2, highest * 2.2)  # room for the legend


def _show_tokens(axis: Any, s_values: Sequence[int]) -> None:
    axis.set_xscale("log")
    shown = [s for i, s in enumerate(s_values) if i == 0 or s >= 2 * s_values[i - 1]]
    axis.set_xticks(shown, [f"{s // 1024}k" if s % 1024 == 0 else str(s) for s in shown])
    axis.minorticks_off()
    axis.set_xlabel("S, tokens")
    finish(axis)


def _styles(rows: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """A colour a family, a line style for each of its contenders; the floor black and dashed."""
    styles: dict[str, dict[str, Any]] = {}
    seen: dict[str, int] = {}
    for contender in dict.fromkeys(row.contender for row in rows):
        if contender == FLOOR:
            styles[contender] = {"color": FLOOR_COLOR, "linestyle": "--", "linewidth": 1.2}
            continue
        family = next((key for key in FAMILIES if key in contender), "")
        index = seen[family] = seen.get(family, -1) + 1
        own = family == "mla_fp8"
        styles[contender] = {
            "color": FAMILIES.get(family, OTHER_COLOR),
            "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
            "linewidth": 2.2 if own else 1.1,
            "marker": "o" if own else ".",
            "markersize": 4,
            "zorder": 5 if own else 2,
        }
    return styles


def main() -> None:
    results, target = map(Path, sys.argv[1:])
    names = {field.name for field in dataclasses.fields(Row)}
    draw(target, [Row(**{name: value for name, value in row.items() if name in names}) for row in read(results)])


if __name__ == "__main__":
    main()
