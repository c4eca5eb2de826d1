"""quantize_q_nope on a GPU against copies that move the same bytes.

    python benchmarks/quantize.py [--s 1024,4096] [--heads 128] [--json FILE]

Method as in gpu.py. A copy reads half of the op's bytes and writes the other half: `memcpy` is the driver's copy,
`elementwise` is torch's bitwise_not. The stream ceiling is the faster of the two.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import timing
import torch
from gpu import integers
from report import environment, microseconds, origin, write_json
from rich.console import Console
from rich.table import Table
from sides import ROPE_DIM, rotation
from torch import Tensor

from mla_fp8 import reference

GROUP = 128
OWN, MEMCPY, ELEMENTWISE = "quantize_q_nope", "memcpy", "elementwise"


@dataclass(frozen=True)
class Row:
    s: int
    heads: int
    input: str  # q_nope is usually a view of q[S, H, 128 + 64]
    bytes_moved: int
    us: float
    us_p20: float
    us_p80: float
    gbps: float
    memcpy_us: float
    elementwise_us: float
    percent_of_stream: float


def check(q_nope: Tensor, val: Tensor, scale: Tensor) -> None:
    want_val, want_scale = reference.quantize_q_nope(q_nope)
    if not (torch.equal(val.view(torch.uint8), want_val.view(torch.uint8)) and torch.equal(scale, want_scale)):
        sys.exit(f"quantize_q_nope differs from the reference for {tuple(q_nope.shape)} {q_nope.stride()}")


def measure(s: int, heads: int, width: int) -> Row:
    m = math.ceil(s / 256) * 256
    read, written = s * heads * GROUP * 2, heads * m * (GROUP + 4)
    half = (read + written) // 2 // 16 * 16
    sets = range(rotation(read + written, torch.cuda.get_device_properties(0).L2_cache_size))
    inputs = [torch.randn(s, heads, width, device="cuda").bfloat16()[..., :GROUP] for _ in sets]
    outputs = [torch.ops.mla_fp8.quantize_q_nope(q_nope) for q_nope in inputs]
    copies = [torch.randint(0, 255, (2, half), dtype=torch.uint8, device="cuda").view(torch.int32) for _ in sets]
    op = torch.ops.mla_fp8.quantize_q_nope.out
    calls: Mapping[str, list[Callable[[], object]]] = {
        OWN: [partial(op, inputs[i], val_out=outputs[i][0], scale_out=outputs[i][1]) for i in sets],
        MEMCPY: [partial(pair[1].copy_, pair[0]) for pair in copies],
        ELEMENTWISE: [partial(torch.bitwise_not, pair[0], out=pair[1]) for pair in copies],
    }
    launches = timing.launches_for(read + written, len(sets))
    graphs = {name: timing.capture(ones, launches) for name, ones in calls.items()}
    for val, scale in outputs:
        val.view(torch.uint8).fill_(255)
        scale.fill_(math.nan)
    graphs[OWN].graph.replay()
    for q_nope, (val, scale) in zip(inputs, outputs, strict=True):
        check(q_nope, val, scale)
    samples = timing.interleave(graphs, timing.REPLAYS)
    own, memcpy, elementwise = (timing.Timing.of(samples[name]) for name in (OWN, MEMCPY, ELEMENTWISE))
    return Row(
        s=s,
        heads=heads,
        input="contiguous" if width == GROUP else f"view of [S,H,{width}]",
        bytes_moved=read + written,
        us=own.us,
        us_p20=own.p20,
        us_p80=own.p80,
        gbps=(read + written) / own.us / 1e3,
        memcpy_us=memcpy.us,
        elementwise_us=elementwise.us,
        percent_of_stream=100 * min(memcpy.us, elementwise.us) / own.us,
    )


def show(console: Console, rows: list[Row]) -> None:
    table = Table(title=OWN, title_justify="left")
    for column in ("S", "H", "input", "µs", "p20", "p80", "GB/s", "% of stream", "over memcpy", "over elementwise"):
        table.add_column(column, justify="left" if column == "input" else "right")
    for row in rows:
        times = map(microseconds, (row.us, row.us_p20, row.us_p80))
        ratios = (f"{row.us / peer:.2f}x" for peer in (row.memcpy_us, row.elementwise_us))
        rates = f"{row.gbps:.0f}", f"{row.percent_of_stream:.1f}"
        table.add_row(str(row.s), str(row.heads), row.input, *times, *rates, *ratios)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--s", type=integers, default=[1, 16, 128, 1024, 4096], help="tokens")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write one JSON object a row")
    parser.add_argument("--commit", help="for the JSON rows, where git cannot tell")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    if not torch.cuda.is_available():
        console.print("benchmarks/quantize.py: needs a CUDA device")
        return 2
    facts = environment(options.commit)
    rows = [measure(s, options.heads, width) for s in options.s for width in (GROUP, GROUP + ROPE_DIM)]
    show(console, rows)
    console.print(origin(facts))
    if options.json:
        write_json(options.json, map(asdict, rows), facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
