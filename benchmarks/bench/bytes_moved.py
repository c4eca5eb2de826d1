"""Two modes of gpu.py about bytes: quantize_q_nope beside copies, and what the ops move to and from
DRAM.

Quantize: a copy reads half of the op's bytes and writes the other half: `memcpy` is the driver's
copy, `elementwise` is torch's bitwise_not. The stream ceiling is the faster of the two. Method as
for the other ops.

DRAM: Nsight Compute's counters beside the bytes that an op cannot avoid. Needs `ncu` and the right
to read counters. Each op runs once with cold caches. What is still in L2 when a kernel ends has not
been written yet, up to L2's size; the table says how much that can be. Status 1 if read and written
bytes together are off by more than 5%, that aside.
"""

import argparse
import csv
import io
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from mla_fp8 import reference
from mla_fp8.formats import GROUP

from . import timing
from .contenders import ours
from .measure import Timed, WrongResult, l2_bytes
from .report import HERE, grid, microseconds
from .sides import M_ALIGNMENT, ROPE_DIM, SIDES, Buffers, rotation, round_up

OWN, MEMCPY, ELEMENTWISE = "quantize_q_nope", "memcpy", "elementwise"
DEFAULT_QUANTIZE_S, DEFAULT_DRAM_S = [1, 16, 128, 1024, 4096], [2048, 8192]
METRICS = {"read": "dram__bytes_read.sum", "written": "dram__bytes_write.sum"}
KERNELS = "regex:^(absorb_q|v_up|bmm)_"
LIMIT = 0.05

Records = list[dict[str, object]]


@dataclass
class Row(Timed):
    s: int
    heads: int
    input: str  # q_nope is usually a view of q[S, H, 128 + 64]
    bytes_moved: int
    memcpy_us: float = 0.0
    elementwise_us: float = 0.0
    percent_of_stream: float = 0.0


def check(q_nope: Tensor, val: Tensor, scale: Tensor) -> None:
    want_val, want_scale = reference.quantize_q_nope(q_nope)
    if not (torch.equal(val.view(torch.uint8), want_val.view(torch.uint8)) and torch.equal(scale, want_scale)):
        raise WrongResult(f"{OWN} differs from the reference for {tuple(q_nope.shape)} {q_nope.stride()}")


def measure_quantize(s: int, heads: int, width: int, replays: int) -> Row:
    moved = s * heads * GROUP * 2 + heads * round_up(s, M_ALIGNMENT) * (GROUP + 4)
    half = moved // 2 // 16 * 16
    sets = range(rotation(moved, l2_bytes()))
    inputs = [torch.randn(s, heads, width, device="cuda").bfloat16()[..., :GROUP] for _ in sets]
    outputs = [torch.ops.mla_fp8.quantize_q_nope(q_nope) for q_nope in inputs]
    copies = [torch.randint(0, 255, (2, half), dtype=torch.uint8, device="cuda").view(torch.int32) for _ in sets]
    op = torch.ops.mla_fp8.quantize_q_nope.out
    calls: Mapping[str, list[Callable[[], object]]] = {
        OWN: [partial(op, inputs[i], val_out=outputs[i][0], scale_out=outputs[i][1]) for i in sets],
        MEMCPY: [partial(pair[1].copy_, pair[0]) for pair in copies],
        ELEMENTWISE: [partial(torch.bitwise_not, pair[0], out=pair[1]) for pair in copies],
    }
    launches = timing.launches_for(moved, len(sets))
    graphs = {name: timing.capture(ones, launches) for name, ones in calls.items()}
    for val, scale in outputs:
        val.view(torch.uint8).fill_(255)
        scale.fill_(math.nan)
    graphs[OWN].graph.replay()
    for q_nope, (val, scale) in zip(inputs, outputs, strict=True):
        check(q_nope, val, scale)
    samples = timing.interleave(graphs, replays)
    row = Row(s, heads, "contiguous" if width == GROUP else f"view of [S,H,{width}]", moved)
    row.take(samples[OWN], moved)
    row.memcpy_us, row.elementwise_us = (timing.Timing.of(samples[name]).us for name in (MEMCPY, ELEMENTWISE))
    row.percent_of_stream = 100 * min(row.memcpy_us, row.elementwise_us) / (row.us or math.nan)
    return row


def quantize(options: argparse.Namespace, console: Console) -> tuple[Records, int]:
    cases = itertools.product(options.heads, options.s or DEFAULT_QUANTIZE_S, (GROUP, GROUP + ROPE_DIM))
    rows = [measure_quantize(s, heads, width, options.replays) for heads, s, width in cases]
    columns = ("µs", "p20", "p80", "GB/s", "% of stream", "over memcpy", "over elementwise")
    table = grid(OWN, "input", "S", "H", *columns)
    for row in rows:
        times = map(microseconds, (row.us, row.us_p20, row.us_p80))
        ratios = (f"{(row.us or 0) / peer:.2f}x" for peer in (row.memcpy_us, row.elementwise_us))
        rates = f"{row.gbps:.0f}", f"{row.percent_of_stream:.1f}"
        table.add_row(row.input, str(row.s), str(row.heads), *times, *rates, *ratios)
    console.print(table)
    return [asdict(row) for row in rows], 0


def launch_once(s: int, heads: int) -> None:
    """What ncu watches: one launch a side."""
    for side in SIDES.values():
        ours(side)[0].call(Buffers(side, s, heads, {}, seed=0))
        torch.cuda.synchronize()


def counted(s: int, heads: int) -> list[tuple[str, dict[str, float]]]:
    """A kernel's name and its bytes, a side after the other."""
    command = ["ncu", "--csv", "--print-units", "base", "--clock-control", "none", "--kernel-name", KERNELS]
    command += ["--metrics", ",".join(METRICS.values()), sys.executable, str(HERE / "gpu.py"), "--launch-once"]
    result = subprocess.run([*command, "--s", str(s), "--heads", str(heads)], capture_output=True, text=True)
    begin = result.stdout.find('"ID"')
    if begin < 0:
        raise SystemExit(f"--dram-bytes: ncu gave no counters: {(result.stderr or result.stdout)[-500:]}")
    kernels: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(io.StringIO(result.stdout[begin:])):
        _, values = kernels.setdefault(row["ID"], (row["Kernel Name"], {}))
        for name, metric in METRICS.items():
            if row["Metric Name"] == metric:
                values[name] = float(row["Metric Value"].replace(",", ""))
    return list(kernels.values())


def dram_bytes(options: argparse.Namespace, console: Console) -> tuple[Records, int]:
    columns = ("MB read", "unavoidable", "MB written", "unavoidable", "all, off by", "left in L2, at most")
    table = grid(None, "kernel", "S", *columns)
    rows: Records = []
    status = 0
    for heads, s in itertools.product(options.heads, options.s or DEFAULT_DRAM_S):
        for side, (kernel, got) in zip(SIDES.values(), counted(s, heads), strict=True):
            read, written = side.read_bytes(s, heads) + side.weight_bytes(heads), side.written_bytes(s, heads)
            left = min(l2_bytes(), written) / (read + written)
            off = (got["read"] + got["written"]) / (read + written) - 1
            status |= not -left - LIMIT <= off <= LIMIT
            megabytes = [f"{value / 1e6:.1f}" for value in (got["read"], read, got["written"], written)]
            table.add_row(kernel, str(s), *megabytes, f"{off:+.1%}", f"{left:.1%}")
            row = {"mode": "dram_bytes", "side": side.name, "s": s, "heads": heads, "kernel": kernel}
            model = {"read_model": read, "written_model": written, "off_by": off, "left_at_most": left}
            rows.append({**row, **got, **model})
    console.print(table)
    return rows, int(status)
