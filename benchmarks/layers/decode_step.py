"""absorb_q, attention and v_up in one decode step: the time and the share of each.

    python -m benchmarks.layers.decode_step [--batch 1,32,128] [--context 1024,8192,32768] [--heads 128,16]
    python -m benchmarks.layers.decode_step --backends torch,flash_mla    of torch, compiled, flash_mla, flashinfer
    python -m benchmarks.layers.decode_step --quick                       fewer shapes and replays

    q_nope, q_pe -> absorb_q -> q [S,H,576] bf16 -> attention over latents [S,T,576] -> o_latent -> v_up -> v [S,H,128]

Method as in gpu.py: a graph a part over buffers that together exceed L2 three times, all parts of a
case in turn, the median and the 20th and 80th percentile. Shares are of the sum of the parts, with
the fastest attention; `step` is that chain in one graph, where each part finds in L2 what the one
before wrote. Everything is checked first: absorb_q and v_up against mla_fp8.reference, attention
against fp64. A backend that is wrong or fails is a row that says so; status 1: something was wrong,
3: an op of mla_fp8 failed.
"""

import argparse
import importlib.metadata
import itertools
import sys
from dataclasses import asdict

import torch
from rich.console import Console

from mla_fp8.attention.backends import PACKAGES, PAGE

from ..bench import report, timing
from ..bench.measure import release
from ..bench.report import integers, microseconds
from .decode_case import BACKENDS, OWN, Case, Part, Shape


def show(console: Console, case: Case) -> None:
    table = report.grid(str(case.shape), "part", "µs", "p20", "p80", "GB/s", "share")
    for row in case.rows.values():
        name = row.part if row.backend == OWN else f"{row.part}: {row.backend}"
        if row.us is None:
            table.add_row(f"{name}: {row.status}: {row.reason}", *[""] * 5, style="dim")
            continue
        share = "" if row.share is None else f"{row.share:.1%}"
        table.add_row(name, *map(microseconds, (row.us, row.us_p20, row.us_p80)), f"{row.gbps:.0f}", share)
    console.print(table)


def versions() -> dict[str, str | None]:
    """Of the packages that backends come with, as far as they are installed."""
    installed: dict[str, str | None] = {}
    for package in PACKAGES.values():
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def names(text: str) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in BACKENDS:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(BACKENDS)}")
    return chosen


def parser() -> argparse.ArgumentParser:
    parser = report.parser_of(__doc__)
    parser.add_argument("--batch", type=integers, help="sequences (default 1,32,128; with --quick 1,32)")
    parser.add_argument("--context", type=integers, help="tokens of each (default 1024,8192,32768; with --quick 1024)")
    parser.add_argument("--heads", type=integers, default=[128, 16])
    parser.add_argument("--backends", type=names, default=list(BACKENDS), help=f"of {','.join(BACKENDS)}")
    parser.add_argument("--replays", type=int, default=timing.REPLAYS)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and replays")
    return parser


def arguments() -> argparse.Namespace:
    options = parser().parse_args()
    options.batch = options.batch or ([1, 32] if options.quick else [1, 32, 128])
    options.context = options.context or ([1024] if options.quick else [1024, 8192, 32768])
    for context in options.context:
        if context % PAGE or context < 1:
            parser().error(f"--context must be a multiple of {PAGE}, got {context}")
    return options


@torch.no_grad()
def main() -> int:
    options, console = arguments(), report.console_of()
    if report.needs_gpu(console):
        return 2
    facts = report.environment(options.commit) | versions()
    rows: list[Part] = []
    for heads, batch, context in itertools.product(options.heads, options.batch, options.context):
        case = Case(Shape(batch, context, heads), options.backends)
        case.check()
        case.time(timing.QUICK_REPLAYS if options.quick else options.replays)
        show(console, case)
        rows += case.rows.values()
        if options.json:  # after every case: a run that is cut off keeps what it has
            report.write_json(options.json, map(asdict, rows), facts)
        del case
        release()
    report.finish(console, options, map(asdict, rows), facts)
    bad = [f"{row.part} {row.backend}: {row.status}" for row in rows if row.status in ("wrong", "failed")]
    if bad:
        console.print("\n".join(dict.fromkeys(bad)), style="bold red", markup=False)
    if any(row.status == "wrong" for row in rows):
        return 1
    return 3 if any(row.status == "failed" and row.backend == OWN for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
