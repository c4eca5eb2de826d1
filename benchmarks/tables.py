"""Fills the tables of README.md and docs/*.md from benchmarks/results/*.json.

    python benchmarks/tables.py            rewrite them
    python benchmarks/tables.py --check    status 1 if that would change one

A block stands between `<!-- table: NAME -->` and `<!-- end -->`; a name whose results are not there keeps its text.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import quality_table
import step_tables
from roofline import table as roofline
from sides import SIDE_TITLES, SIDES, device_of
from tabular import Rows, markdown, microseconds, read, where_from

from mla_fp8.config import select_config

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
HEADS = 128
SHOWN_TILES = 5
FLOOR = "floor"


def gpu(rows: Rows) -> str:
    """Per side: ours, the floor, the fused Triton kernel, the fastest other; in brackets what ours is faster by."""
    timed = [row for row in rows if row.get("us") and row["heads"] == HEADS]
    s_values = sorted({row["s"] for row in timed})
    lines: list[list[str]] = []
    for side, title in SIDE_TITLES.items():
        by_s = {s: [row for row in timed if row["side"] == side and row["s"] == s] for s in s_values}
        if any(by_s.values()):
            lines += [[f"**{title}**", *(_own(by_s[s]) for s in s_values)]]
            lines += [["the same bytes, no mathematics", *(_other(by_s[s], _is_floor) for s in s_values)]]
            lines += [["one fused Triton kernel", *(_other(by_s[s], _is_triton) for s in s_values)]]
            lines += [["fastest of the others", *(_other(by_s[s], _is_peer) for s in s_values)]]
    lines = [line for line in lines if line[0].startswith("**") or any(line[1:])]
    origin = where_from(timed[0])
    note = f"µs, median, weights cold, H = {HEADS}; in brackets, that time over ours. {origin}.\n"
    return markdown(["", *(f"S = {s}" for s in s_values)], lines) + "\n" + note


def heads(rows: Rows) -> str:
    """Per side and H, ours over S; in brackets, what it is faster by than the fastest other but Triton."""
    timed = [row for row in rows if row.get("us")]
    s_values = sorted({row["s"] for row in timed})
    lines: list[list[str]] = []
    for side, title in SIDE_TITLES.items():
        for count in sorted({row["heads"] for row in timed if row["side"] == side}):
            by_s = [
                [row for row in timed if (row["side"], row["heads"], row["s"]) == (side, count, s)] for s in s_values
            ]
            lines += [[title, str(count), *(_beside_fastest(case) for case in by_s)]]
    origin = where_from(timed[0])
    note = f"µs, median, weights cold; in brackets, the fastest other's time over ours. {origin}.\n"
    return markdown(["", "H", *(f"S = {s}" for s in s_values)], lines) + "\n" + note


def _beside_fastest(case: Rows) -> str:
    own, others = _own_us(case), [row["us"] for row in case if _is_peer(row)]
    return "" if own is None or not others else f"{microseconds(own)} ({min(others) / own:.2f}x)"


def _is_floor(row: Mapping[str, Any]) -> bool:
    return bool(row["contender"] == FLOOR)


def _is_triton(row: Mapping[str, Any]) -> bool:
    return "fused Triton kernel" in row["contender"]


def _is_peer(row: Mapping[str, Any]) -> bool:
    return not (row["ours"] or _is_floor(row) or _is_triton(row))


def _own_us(rows: Rows) -> float | None:
    """The first of ours is the op; others are its parts."""
    return next((row["us"] for row in rows if row["ours"]), None)


def _own(rows: Rows) -> str:
    own = _own_us(rows)
    return "" if own is None else f"**{microseconds(own)}**"


def _other(rows: Rows, belongs: Callable[[Mapping[str, Any]], bool]) -> str:
    times = [row["us"] for row in rows if belongs(row)]
    if not times:
        return ""
    own = _own_us(rows)
    return microseconds(min(times)) + ("" if own is None else f" ({min(times) / own:.2f}x)")


def cpu(rows: Rows) -> str:
    """Per op: ms, and in brackets its ratio to the faster fp32 bmm."""
    s_values = sorted({row["s"] for row in rows})
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        for name in dict.fromkeys(row["contender"] for row in rows if row["op"] == op):
            found = {row["s"]: row for row in rows if row["op"] == op and row["contender"] == name}
            cells = [f"{found[s]['ms']:.2f} ({found[s]['ratio']:.2f})" if s in found else "" for s in s_values]
            own = name.startswith("mla_fp8")
            lines.append([f"**{op}**" if own else name, *(f"**{cell}**" if own else cell for cell in cells)])
    first = rows[0]
    origin = where_from(first, "cpu", "capability", "torch", "commit", "date")
    note = f"ms, median; H = {first['heads']}, {first['threads']} threads. {origin}.\n"
    return markdown(["", *(f"S = {s}" for s in s_values)], lines) + "\n" + note


def quantize(rows: Rows) -> str:
    """Per S and input: µs, that of a copy of the same bytes, the ratio."""
    lines = []
    for row in rows:
        times = microseconds(row["us"]), microseconds(row["memcpy_us"]), f"{row['us'] / row['memcpy_us']:.2f}"
        lines.append([row["input"], str(row["s"]), *times])
    origin = where_from(rows[0], "gpu", "torch")
    note = f"µs, median, H = {rows[0]['heads']}. {origin}.\n"
    return markdown(["q_nope", "S", "quantize_q_nope", "copy of the same bytes", "ratio"], lines) + "\n" + note


def tiles(rows: Rows) -> str:
    """Per problem: the tile that select_config chooses now, its time over the fastest one's, the five fastest."""
    lines = []
    for row in rows:
        us = row["us"]
        chosen = select_config(SIDES[row["side"]].problem(row["s"], row["heads"]), device_of(row["gpu"])).tile.symbol
        fastest = sorted(us.items(), key=lambda one: one[1])[:SHOWN_TILES]
        times = ", ".join(f"{tile} {microseconds(time)}" for tile, time in fastest)
        over = f"{us[chosen] / fastest[0][1]:.3f}" if chosen in us else "not measured"  # a tile newer than the record
        cells = [row["side"], str(row["heads"]), str(row["s"]), chosen, over, times]
        lines.append(cells)
    origin = where_from(rows[0])
    note = f"µs, median, weights cold, bits equal. {origin}.\n"
    return markdown(["", "H", "S", "chosen", "over best", "the fastest, µs"], lines) + "\n" + note


RENDERERS: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "cpu": ("cpu.json", cpu),
    "gpu": ("h100.json", gpu),
    "gpu_h200": ("h200.json", gpu),
    "heads": ("heads.json", heads),
    "rows": ("rows.json", heads),
    "quantize": ("quantize.json", quantize),
    "tiles": ("tiles.json", tiles),
    "decode_step": ("decode_step.json", step_tables.decode_step),
    "tensor_parallel": ("tensor_parallel.json", step_tables.tensor_parallel),
    "prefill": ("prefill.json", step_tables.prefill),
    "sglang_hook": ("sglang_hook.json", step_tables.sglang_hook),
    "roofline": ("h100.json", roofline),
    "quality": ("quality.json", quality_table.quality),
    "quality_sentence": ("quality.json", quality_table.sentence),
}


def fill(text: str, results: Path = RESULTS) -> str:
    """Raises: ValueError for a block of an unknown name."""

    def block(match: re.Match[str]) -> str:
        begin, name, old, end = match.groups()
        if name not in RENDERERS:
            raise ValueError(f"tables: the name of a table must be one of {', '.join(RENDERERS)}, got {name}")
        file, render = RENDERERS[name]
        body = render(read(results / file)) if (results / file).exists() else old
        return begin + body + end

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    stale = False
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = file.read_text()
        filled = fill(text)
        if filled == text:
            continue
        stale = True
        if check:
            print(f"{file} is not what benchmarks/results/ says: run python benchmarks/tables.py")
        else:
            file.write_text(filled)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
