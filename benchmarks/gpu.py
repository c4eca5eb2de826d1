"""absorb_q, v_up and bmm on a GPU against what else there is, and against the floor.

    python benchmarks/gpu.py [--s 1,16,64] [--heads 128,16] [--sides front,back,gemm] [--json FILE] [--plot FILE]
    python benchmarks/gpu.py --quick        fewer shapes, replays and configurations
    python benchmarks/gpu.py --chain        between a kernel that writes q_nope and one that reads q
    python benchmarks/gpu.py --host         host µs a call
    python benchmarks/gpu.py --quantize     quantize_q_nope beside copies of the same bytes
    python benchmarks/gpu.py --dram-bytes   no times: the bytes that go to and from DRAM, counted with ncu

Sides: front512, front576, front576_fp8 (together: front), back, back_fp8 (together: back), gemm.

Method. A contender's time is that of a CUDA graph of back-to-back launches over buffer sets
(activations, weights, outputs) that together exceed L2 three times, divided by the launches; the
graphs of all contenders of a case replay in turn, and the table has the median and the 20th and
80th percentile over the replays. Everything is checked first, each result against exact arithmetic
on the FP8 checkpoint in float64, which is the error that the table has, and ours against the
reference: a wrong one ends the program with status 1 before any time is printed. GB/s and % of stream
count the bytes that a side cannot avoid (bench/sides.py). `floor` is one launch that moves these
bytes and computes nothing (bench/triton_calls.py). Status 3: all was measured but for an op of
mla_fp8 that failed.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from mla_fp8 import formats
from mla_fp8.__main__ import INTERRUPTED
from mla_fp8.cli.bench import as_package

if not __package__:
    __package__ = as_package(__file__)

from .bench import bytes_moved, chain_and_host, plot, report, timing, triton_calls
from .bench.measure import Case, Row, WrongResult
from .bench.sides import GROUPS, SIDES

DEFAULT_S = "1,16,32,64,128,256,512,1024,2048,8192,65536"
QUICK_S = "1,64,512"
MAX_COMPILE_S = 2048  # beyond, kernels are the same and memory is short for several processes
MODES = {
    "chain": (chain_and_host.chain, "µs that the op adds to a chain of kernels"),
    "host": (chain_and_host.host, "host µs a call"),
    "quantize": (bytes_moved.quantize, "quantize_q_nope beside copies of the same bytes"),
    "dram_bytes": (bytes_moved.dram_bytes, "bytes to and from DRAM, counted with ncu"),
}


def side_names(text: str) -> list[str]:
    names = [name for part in text.split(",") for name in GROUPS.get(part, [part])]
    for name in names:
        if name not in SIDES:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join([*GROUPS, *SIDES])}")
    return list(dict.fromkeys(names))


def parser() -> argparse.ArgumentParser:
    parser = report.parser_of(__doc__)
    parser.add_argument("--s", type=report.integers, help=f"tokens (default {DEFAULT_S}; with --quick {QUICK_S})")
    parser.add_argument("--heads", type=report.integers, default=[128])
    parser.add_argument("--sides", type=side_names, default=side_names("front,back"))
    parser.add_argument("--activations", choices=formats.MODES, help="of ours; default: both, a row each")
    parser.add_argument("--replays", type=int, default=timing.REPLAYS)
    parser.add_argument("--plot", type=Path, help="draw time and fraction of the floor over S (.svg or .png)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, replays and configurations")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes that compile")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--launch-once", action="store_true", help=argparse.SUPPRESS)
    for name, (_, text) in MODES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest="mode", action="store_const", const=name, help=text)
    return parser


def compile_in_parallel(cases: list[Case], options: argparse.Namespace, bar: Progress) -> None:
    """A process a case fills the disk caches of Triton and the libraries, before the check."""
    small = [case for case in cases if case.s <= MAX_COMPILE_S] if options.jobs > 1 else []
    task = bar.add_task("compile", total=len(small), visible=bool(small))

    def compile_one(case: Case) -> None:
        command = [sys.executable, __file__, "--compile-only", "--sides", case.side.name]
        command += ["--s", str(case.s), "--heads", str(case.heads)] + ["--quick"] * options.quick
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # the check will tell
        bar.advance(task)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(compile_one, small))


def cases_of(options: argparse.Namespace) -> list[Case]:
    s_values = options.s or report.integers(QUICK_S if options.quick else DEFAULT_S)
    modes = (options.activations,) if options.activations else formats.MODES
    return [
        Case(SIDES[side], s, h, activations=modes) for side in options.sides for h in options.heads for s in s_values
    ]


def compare(options: argparse.Namespace, console: Console, facts: report.Facts) -> list[Row]:
    cases = cases_of(options)
    replays = timing.QUICK_REPLAYS if options.quick else options.replays
    rows: list[Row] = []
    with report.progress(console) as bar:
        compile_in_parallel(cases, options, bar)
        checked = bar.add_task("check", total=len(cases))
        right = []
        for case in cases:
            bar.update(checked, description=f"check {case.title}")
            right.append(case.check(options.quick))
            bar.advance(checked)
        stream_gbps, how = triton_calls.stream_ceiling(options.quick)
        console.print(f"stream ceiling: {stream_gbps:.0f} GB/s read and written ({how})")
        timed = bar.add_task("time", total=len(cases) * (replays + 1))
        for case, configs in zip(cases, right, strict=True):
            bar.update(timed, description=f"tune {case.title}")
            case.tune(configs, options.quick)
            bar.update(timed, description=f"time {case.title}")
            measured = case.time(replays, stream_gbps, lambda: bar.advance(timed))
            for row in measured:
                where_row = {"device": "cuda", "sides": row.side, "s": row.s, "heads": row.heads, "rounds": replays}
                where_row |= {"activations": options.activations} if options.activations else {}
                row.reproduce = report.again(where_row) + " --quick" * options.quick
            report.show(console, measured, report.origin(facts))
            rows += measured
            if options.json:  # after every case: a long run that is cut off keeps what it has
                report.write_json(options.json, rows, facts)
    return rows


def failures(rows: list[Row]) -> list[str]:
    return [f"{row.contender} ({row.side}, S={row.s}, H={row.heads})" for row in rows if row.ours and row.us is None]


@torch.no_grad()
def main() -> int:
    options, console = parser().parse_args(), report.console_of()
    if report.needs_gpu(console):
        return 2
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        console.print("benchmarks/gpu.py: --plot needs matplotlib")
        return 2
    if options.launch_once:
        bytes_moved.launch_once(options.s[0], options.heads[0])
        return 0
    if options.compile_only:
        for case in cases_of(options):
            case.compile(options.quick)
        return 0
    facts = report.environment(options.commit)
    try:
        if options.mode:
            records, status = MODES[options.mode][0](options, console)
            report.finish(console, options, records, facts)
            return status
        rows = compare(options, console, facts)
    except WrongResult as error:
        console.print(f"wrong result: {error}", style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    if options.plot:
        plot.draw(options.plot, rows)
    if failed := failures(rows):
        console.print(f"own ops that failed: {', '.join(failed)}", style="bold red", markup=False)
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
