"""Fills the tables of README.md and docs/*.md from benchmarks/results/*.json.

    python -m benchmarks.bench.tables            rewrite them
    python -m benchmarks.bench.tables --check    status 1 if that would change one

A block stands between `<!-- table: NAME -->` and `<!-- end -->`; a name whose results are not there
keeps its text.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mla_fp8.config import Device, select_config

from ..quality import rounding
from . import layer_tables
from .measure import FLOOR
from .report import HERE, RESULTS, Rows, markdown, microseconds, note, read
from .roofline import table as roofline
from .sides import SIDES

ROOT = HERE.parent
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
HEADS = 128
WORST_CELLS = 3  # shown of each side
LIMIT = 1.05  # of the best tile's time: what the chosen one may take
EARNED = 1.03  # by how much a tile is the fastest where that counts
PEER, TRITON = "torch.bmm", "fused Triton kernel"


def gpu(rows: Rows) -> str:
    """Per side: ours, the floor, Triton, the fastest other; in brackets what ours is faster by; and the errors."""
    timed = [row for row in rows if row.get("us") and row["heads"] == HEADS]
    s_values = sorted({row["s"] for row in timed})
    others: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "ours, activations in FP8": lambda row: row["ours"] and row["contender"].endswith(", fp8"),
        "the same bytes, no mathematics": lambda row: row["contender"] == FLOOR,
        "one fused Triton kernel": lambda row: TRITON in row["contender"],
        "fastest of the others": _is_peer,
    }
    lines: list[list[str]] = []
    for side in SIDES.values():
        by_s = [[row for row in timed if row["side"] == side.name and row["s"] == s] for s in s_values]
        if any(by_s):
            own = [one for case in by_s if (one := _own_row(case))]
            lines += [[f"**{side.label}**", *(_own(case) for case in by_s), f"**{_error(own)}**"]]
            for name, belongs in others.items():
                fastest = [min(of_s, key=_us) for case in by_s if (of_s := [row for row in case if belongs(row)])]
                lines += [[name, *(_other(case, belongs) for case in by_s), _error(fastest)]]
    lines = [line for line in lines if line[0].startswith("**") or any(line[1:])]
    told = f"µs, median, weights cold, H = {HEADS}; in brackets, that time over ours; error, relative, from exact"
    told += " arithmetic on the FP8 checkpoint, the largest of these S"
    return markdown(["", *(f"S = {s}" for s in s_values), "error"], lines) + note(told, timed[0])


def heads(rows: Rows) -> str:
    """Per side and H, ours over S; in brackets, the fastest other's time over it, but Triton's."""
    timed = [row for row in rows if row.get("us")]
    s_values = sorted({row["s"] for row in timed})
    lines: list[list[str]] = []
    for side in SIDES.values():
        for count in sorted({row["heads"] for row in timed if row["side"] == side.name}):
            by_s = [
                [row for row in timed if (row["side"], row["heads"], row["s"]) == (side.name, count, s)]
                for s in s_values
            ]
            lines += [[side.label, str(count), *(_beside_fastest(case) for case in by_s)]]
    told = "µs, median, weights cold; in brackets, the fastest other's time over ours"
    return markdown(["", "H", *(f"S = {s}" for s in s_values)], lines) + note(told, _runs(timed))


def _runs(rows: Rows) -> Mapping[str, str]:
    """What `note` names, of every run that the rows come from."""
    return {
        key: ", ".join(dict.fromkeys(str(row.get(key)) for row in rows)) for key in ("gpu", "torch", "commit", "date")
    }


def _beside_fastest(case: Rows) -> str:
    own, others = _own_us(case), [row["us"] for row in case if _is_peer(row)]
    return "" if own is None or not others else f"{microseconds(own)} ({min(others) / own:.2f}x)"


def _is_peer(row: Mapping[str, Any]) -> bool:
    return not (row["ours"] or row["contender"] == FLOOR or TRITON in row["contender"])


def _own_row(rows: Rows) -> Mapping[str, Any] | None:
    """The first of ours is the op; others are its other mode and its parts."""
    return next((row for row in rows if row["ours"]), None)


def _own_us(rows: Rows) -> float | None:
    own = _own_row(rows)
    return None if own is None else float(own["us"])


def _us(row: Mapping[str, Any]) -> float:
    return float(row["us"])


def _error(rows: Rows) -> str:
    """The largest of them; none of rows that compute nothing."""
    errors = [row["relative_error"] for row in rows if row["contender"] != FLOOR]
    return f"{max(errors):.1e}".replace("e-0", "e-") if errors else ""


def _own(rows: Rows) -> str:
    own = _own_us(rows)
    return "" if own is None else f"**{microseconds(own)}**"


def _other(rows: Rows, belongs: Callable[[Mapping[str, Any]], bool]) -> str:
    times, own = [row["us"] for row in rows if belongs(row)], _own_us(rows)
    if not times:
        return ""
    return microseconds(min(times)) + ("" if own is None else f" ({min(times) / own:.2f}x)")


def cpu(rows: Rows) -> str:
    """Per op: ms, and in brackets its ratio to the fastest torch.bmm."""
    s_values = sorted({row["s"] for row in rows})
    lines = []
    for op, name in dict.fromkeys((row["op"], row["contender"]) for row in rows):
        found = {row["s"]: row for row in rows if row["op"] == op and row["contender"] == name}
        cells = [f"{found[s]['ms']:.2f} ({found[s]['ratio']:.2f})" if s in found else "" for s in s_values]
        own = name.startswith("mla_fp8")
        lines.append([f"**{op}**" if own else name, *(f"**{cell}**" if own else cell for cell in cells)])
    told = f"ms, median; H = {rows[0]['heads']}, {rows[0]['threads']} threads"
    origin = ("cpu", "capability", "torch", "commit", "date")
    return markdown(["", *(f"S = {s}" for s in s_values)], lines) + note(told, rows[0], *origin)


def quantize(rows: Rows) -> str:
    """Per S and input: µs, that of a copy of the same bytes, the ratio."""
    lines = []
    for row in rows:
        times = microseconds(row["us"]), microseconds(row["memcpy_us"]), f"{row['us'] / row['memcpy_us']:.2f}"
        lines.append([row["input"], str(row["s"]), *times])
    told = note(f"µs, median, H = {rows[0]['heads']}", rows[0], "gpu", "torch")
    return markdown(["q_nope", "S", "quantize_q_nope", "copy of the same bytes", "ratio"], lines) + told


def tiles(rows: Rows) -> str:
    """What is chosen now beside the fastest tile, what a tile is for, where torch.bmm is faster."""
    by_side: dict[str, list[tuple[float, str]]] = defaultdict(list)  # over the best, and the cell in words
    slower: dict[str, list[str]] = defaultdict(list)  # cells where PEER is faster
    for row in rows:
        us = tile_times(row)
        best, cell = min(us, key=lambda name: us[name]), f"H = {row['heads']}, S = {row['s']}"
        problem = SIDES[row["side"]].problem(row["s"], row["heads"], row["activations"])
        device, key = Device(**row["device"]), f"{SIDES[row['side']].label}, {row['activations']}"
        chosen = select_config(problem, device).tile.symbol
        if chosen not in us:  # newer than the record
            by_side[key].append((float("inf"), f"{cell}: {chosen} not measured"))
            continue
        over = us[chosen] / us[best]
        by_side[key].append((over, f"{cell}: {over:.3f}, {chosen} beside {best}"))
        peer = min((time for name, time in row["us"].items() if name.startswith(PEER)), default=float("inf"))
        if us[chosen] > peer:
            slower[key].append(f"{cell}: {us[chosen] / peer:.2f}")
    lines = []
    for side, cells in by_side.items():
        worst = [words for over, words in sorted(cells, reverse=True)[:WORST_CELLS] if over > 1]
        lines.append([side, str(len(cells)), "; ".join(worst), "; ".join(slower[side])])
    header = ["", "cells", "chosen over best: the worst", f"chosen over {PEER}, where that is faster"]
    told = f"Medians, weights cold; every tile gives the same bits. {len(rows)} cells (H, S)"
    return markdown(header, lines) + "\n" + _earned(rows) + note(told, _runs(rows))


def tile_times(row: Mapping[str, Any]) -> dict[str, float]:
    """µs of each tile; of slow ones a single sample."""
    times = {**row.get("probed_us", {}), **row["us"]}
    return {name: us for name, us in times.items() if not name.startswith(PEER)}


def _earned(rows: Rows) -> str:
    """Per tile, in how many cells it is the fastest by EARNED, and where by most."""
    wins: dict[str, list[tuple[float, str]]] = {name: [] for row in rows for name in tile_times(row)}
    for row in rows:
        (name, us), *others = sorted(tile_times(row).items(), key=lambda one: one[1])
        if others and others[0][1] >= EARNED * us:
            by = others[0][1] / us
            where = f"{SIDES[row['side']].label}, {row['activations']}, H = {row['heads']}, S = {row['s']}"
            cell = f"{by:.2f}x {others[0][0]}: {where}"
            wins[name].append((by, f"{cell}, {microseconds(us)} µs"))
    lines = [[name, str(len(won)), max(won)[1] if won else ""] for name, won in sorted(wins.items())]
    return markdown(["tile", f"fastest by {EARNED - 1:.0%}, cells", "by most"], lines)


RENDERERS: Mapping[str, tuple[str, Callable[[Rows], str]]] = {
    "cpu": ("cpu.json", cpu),
    "gpu": ("h100.json", gpu),
    "gpu_h200": ("h200.json", gpu),
    "heads": ("heads.json", heads),
    "rows": ("rows.json", heads),
    "quantize": ("quantize.json", quantize),
    "tiles": ("tiles.json", tiles),
    "decode_step": ("decode_step.json", layer_tables.decode_step),
    "tensor_parallel": ("tensor_parallel.json", layer_tables.tensor_parallel),
    "prefill": ("prefill.json", layer_tables.prefill),
    "vllm": ("vllm.json", layer_tables.engine),
    "vllm_bars": ("vllm.json", layer_tables.engine_bars),
    "roofline": ("h100.json", roofline),
    "quality": ("quality.json", layer_tables.quality),
    "quality_sentence": ("quality.json", layer_tables.sentence),
    "rounding": ("rounding.json", rounding.table),
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


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check, stale = parser.parse_args(words).check, False
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = file.read_text()
        filled = fill(text)
        if filled == text:
            continue
        stale = True
        if check:
            print(f"{file} is not what benchmarks/results/ says: run python -m benchmarks.bench.tables")
        else:
            file.write_text(filled)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
