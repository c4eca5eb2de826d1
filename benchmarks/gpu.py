"""absorb_q, v_up and bmm on a GPU against what else there is, and against the floor.

    python benchmarks/gpu.py [--s 1,16,64] [--heads 128,16] [--sides front,back,gemm] [--json FILE] [--plot FILE]
    python benchmarks/gpu.py --quick        fewer shapes, replays and configurations
    python benchmarks/gpu.py --chain        between a kernel that writes q_nope and one that reads q
    python benchmarks/gpu.py --host         host µs a call

Sides: front512, front576, front576_fp8 (together: front), back, back_fp8 (together: back), gemm.

Method. A contender's time is that of a CUDA graph of back-to-back launches over buffer sets (activations, weights,
outputs) that together exceed L2 three times, divided by the launches; the graphs of all contenders of a case replay in
turn, and the table has the median and the 20th and 80th percentile over the replays. Everything is checked first, each
result against its reference in float64: a wrong one ends the program with status 1 before any time is printed. GB/s
and % of stream count the bytes that a side cannot avoid (sides.py). `floor` is one launch that moves these bytes and
computes nothing (floor.py). Status 3: all was measured but for an op of mla_fp8 that failed.
"""

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import floor
import plot
import timing
import torch
from measure import Case, Row, WrongResult
from report import again, environment, origin, progress, show, write_json
from rich.console import Console
from rich.progress import Progress
from sides import GROUPS, SIDES

import mla_fp8  # noqa: F401  loads the ops
from mla_fp8.__main__ import INTERRUPTED

DEFAULT_S = "1,16,32,64,128,256,512,1024,2048,8192,65536"
QUICK_S = "1,64,512"
QUICK_REPLAYS = 10
MAX_COMPILE_S = 2048  # beyond, kernels are the same and memory is short for several processes


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def side_names(text: str) -> list[str]:
    names = [name for part in text.split(",") for name in GROUPS.get(part, [part])]
    for name in names:
        if name not in SIDES:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join([*GROUPS, *SIDES])}")
    return list(dict.fromkeys(names))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--s", type=integers, help=f"tokens (default {DEFAULT_S}; with --quick {QUICK_S})")
    parser.add_argument("--heads", type=integers, default=[128])
    parser.add_argument("--sides", type=side_names, default=side_names("front,back"))
    parser.add_argument("--replays", type=int, default=timing.REPLAYS)
    parser.add_argument("--json", type=Path, help="write one JSON object a row")
    parser.add_argument("--plot", type=Path, help="draw time and fraction of the floor over S (.svg or .png)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, replays and configurations")
    parser.add_argument("--chain", action="store_true", help="µs that the op adds to a chain of kernels")
    parser.add_argument("--host", action="store_true", help="host µs a call")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes that compile")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--commit", help="for the JSON rows, where git cannot tell")
    return parser.parse_args()


def compile_in_parallel(cases: list[Case], options: argparse.Namespace, bar: Progress) -> None:
    """A process a case, each filling the caches on disk of Triton and the libraries; the check then need not wait."""
    small = [case for case in cases if case.s <= MAX_COMPILE_S] if options.jobs > 1 else []
    task = bar.add_task("compile", total=len(small), visible=bool(small))

    def compile_one(case: Case) -> None:
        command = [sys.executable, __file__, "--compile-only", "--sides", case.side.name]
        command += ["--s", str(case.s), "--heads", str(case.heads)] + ["--quick"] * options.quick
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # the check will tell
        bar.advance(task)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(compile_one, small))


def compare(options: argparse.Namespace, console: Console, facts: dict[str, str | None]) -> list[Row]:
    where = origin(facts)
    s_values = options.s or integers(QUICK_S if options.quick else DEFAULT_S)
    cases = [Case(SIDES[side], s, h) for side in options.sides for h in options.heads for s in s_values]
    if options.compile_only:
        for case in cases:
            case.compile(options.quick)
        return []
    replays = QUICK_REPLAYS if options.quick else options.replays
    rows: list[Row] = []
    with progress(console) as bar:
        compile_in_parallel(cases, options, bar)
        checked = bar.add_task("check", total=len(cases))
        right = []
        for case in cases:
            bar.update(checked, description=f"check {case.title}")
            right.append(case.check(options.quick))
            bar.advance(checked)
        stream_gbps, how = floor.stream_ceiling(options.quick)
        console.print(f"stream ceiling: {stream_gbps:.0f} GB/s read and written ({how})")
        timed = bar.add_task("time", total=len(cases) * (replays + 1))
        for case, configs in zip(cases, right, strict=True):
            bar.update(timed, description=f"tune {case.title}")
            case.tune(configs, options.quick)
            bar.update(timed, description=f"time {case.title}")
            measured = case.time(replays, stream_gbps, lambda: bar.advance(timed))
            for row in measured:
                where_row = {"device": "cuda", "sides": row.side, "s": row.s, "heads": row.heads, "rounds": replays}
                row.reproduce = again(where_row) + " --quick" * options.quick
            show(console, measured, where)
            rows += measured
            if options.json:  # after every case: a long run that is cut off keeps what it has
                write_json(options.json, rows, facts)
    return rows


def main() -> int:
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 150)
    if not torch.cuda.is_available():
        console.print("benchmarks/gpu.py: needs a CUDA device; benchmarks/cpu.py runs without one")
        return 2
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        console.print("benchmarks/gpu.py: --plot needs matplotlib")
        return 2
    facts = environment(options.commit)
    with torch.no_grad():
        if options.chain or options.host:
            results = importlib.import_module("chain" if options.chain else "host").run(options, console)
            console.print(origin(facts))
            if options.json:
                write_json(options.json, results, facts)
            return 0
        try:
            rows = compare(options, console, facts)
        except WrongResult as error:
            console.print(f"wrong result: {error}", style="bold red", markup=False)
            return 1
        except KeyboardInterrupt:
            return INTERRUPTED
    if options.plot:
        plot.draw(options.plot, rows)
    failed = [f"{row.contender} ({row.side}, S={row.s}, H={row.heads})" for row in rows if row.ours and row.us is None]
    if failed:
        console.print(f"own ops that failed: {', '.join(failed)}", style="bold red", markup=False)
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
