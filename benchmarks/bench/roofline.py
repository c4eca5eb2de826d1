"""The ops under their roofline: how fast a large copy and the tensor cores would let them be, and
how fast they are.

    python -m benchmarks.bench.roofline [--record benchmarks/results/h100.json] [--plot docs/roofline.svg]

tables.py makes a table of the same points.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_fp8.config import Device

from .plot import canvas, finish, save
from .report import HERE, RESULTS, Rows, markdown, note, read
from .sides import SIDES

HEADS = 128
PEAK_TFLOPS = Device().mma_tflops  # FP8, dense, sustained, as select_config has it for any GPU
COLORS = ("#c1272d", "#e69f00", "#9467bd", "#0072b2", "#009e73", "#7f7f7f")
ROOF_COLOR = "#222222"
INTENSITIES = (1.0, 2000.0)  # the plot's width, FLOP a byte
LABELLED_S = (1, 16, 128, 8192)


@dataclass(frozen=True)
class Point:
    """An op at one S: what it computed a byte that it had to move, and a second."""

    side: str
    s: int
    intensity: float  # FLOP a byte
    tflops: float
    roof_tflops: float  # what memory or the tensor cores allow there

    @property
    def percent(self) -> float:
        return 100 * self.tflops / self.roof_tflops


def stream_gbps(row: Mapping[str, Any]) -> float:
    """A large copy's bytes a second, measured in the run that the row is of."""
    return float(100 * row["gbps"] / row["percent_of_stream"])


def points(rows: Rows) -> list[Point]:
    found = []
    for row in rows:
        side = SIDES[row["side"]]
        if row.get("us") and row["heads"] == HEADS and row["contender"] == f"mla_fp8 {side.op}":
            flops = side.flops(row["s"], HEADS)
            intensity = flops / row["bytes"]
            roof = min(intensity * stream_gbps(row) / 1e3, PEAK_TFLOPS)
            found.append(Point(side.name, row["s"], intensity, flops / row["us"] / 1e6, roof))
    return found


def table(rows: Rows) -> str:
    """Per op: FLOPs, bytes, and over S the FLOP a byte and the share of the roof."""
    of = {(point.side, point.s): point for point in points(rows)}
    s_values = sorted({s for _, s in of})
    lines = []
    for name, side in SIDES.items():
        moved = f"S H ({side.read_bytes(1, 1):,} + {side.written_bytes(1, 1):,}) + {side.weight_bytes(1):,} H"
        limit = side.flops(1, 1) / (side.read_bytes(1, 1) + side.written_bytes(1, 1))
        cells = [
            f"{of[name, s].intensity:.1f}: {of[name, s].percent:.0f}%" if (name, s) in of else "" for s in s_values
        ]
        lines.append([side.label, f"{side.flops(1, 1):,} S H", moved, f"{limit:.0f}", *cells])
    first = next(row for row in rows if row.get("percent_of_stream"))
    ridge = PEAK_TFLOPS * 1e3 / stream_gbps(first)
    stream = f"{stream_gbps(first):,.0f} GB/s, a large copy in the same run, up to {ridge:.0f} FLOP a byte"
    roof = f"Roof: {stream}; above, {PEAK_TFLOPS:,.0f} TFLOP/s"
    told = note(f"FLOP a byte: share of the roof, H = {HEADS}, weights cold. {roof}", first)
    header = ["", "FLOP", "bytes: read + written, weights", "FLOP a byte, S large", *(f"S = {s}" for s in s_values)]
    return markdown(header, lines) + told


def draw(path: Path, rows: Rows) -> None:
    """The same as a plot, log over log."""
    figure, axis = canvas(figsize=(9, 5.5))
    first = next(row for row in rows if row.get("percent_of_stream"))
    stream, peak = stream_gbps(first) / 1e3, PEAK_TFLOPS
    low, high = INTENSITIES
    axis.plot([low, peak / stream, high], [low * stream, peak, peak], color=ROOF_COLOR, linewidth=1.4)
    axis.text(1.15, 1.5 * stream, f"a large copy: {1e3 * stream:,.0f} GB/s", rotation=35, color=ROOF_COLOR, fontsize=9)
    axis.text(high / 1.1, 1.08 * peak, f"FP8: {peak:,.0f} TFLOP/s", ha="right", color=ROOF_COLOR, fontsize=9)
    for color, side in zip(COLORS, SIDES.values(), strict=True):
        of_side = sorted((point for point in points(rows) if point.side == side.name), key=lambda point: point.s)
        style = {"color": color, "markersize": 4, "linewidth": 1.1, "label": side.label}
        axis.plot([p.intensity for p in of_side], [p.tflops for p in of_side], "o-", **style)
        for point in of_side if side.name == "front512" else []:
            if point.s in LABELLED_S:
                at = {"xytext": (6, -12), "textcoords": "offset points", "fontsize": 8, "color": color}
                axis.annotate(f"S = {point.s}", (point.intensity, point.tflops), **at)
    axis.set(xscale="log", yscale="log", xlim=INTENSITIES, xlabel="FLOP a byte that has to be moved", ylabel="TFLOP/s")
    axis.set_title(f"{first['gpu']}, H = {HEADS}, weights cold, {first['commit']}", fontsize=10)
    finish(axis)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RESULTS / "h100.json")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "roofline.svg", help=".svg or .png")
    options = parser.parse_args()
    draw(options.plot, read(options.record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
