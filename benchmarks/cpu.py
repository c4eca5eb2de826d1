"""Times absorb_q and v_up on the CPU against torch.bmm, and checks them against the reference
first. The error of every row is from exact arithmetic on the checkpoint's FP8 blocks.

    python benchmarks/cpu.py --s 1 16 128 --heads 128 --threads 2 --json cpu.json --plot cpu.svg

Weights take turns among several copies, as those of a model's layers do. Outside the timed call
every contender gets its output allocated, and torch.bmm its activations converted and head-major
and its weights dequantized; the ops get what a model holds. The ratio is over the fastest
torch.bmm. On a busy machine, medians measure the rest.
"""

import argparse
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mla_fp8 import reference
from mla_fp8.__main__ import INTERRUPTED
from mla_fp8.cli.bench import as_package
from mla_fp8.formats import MODES

if not __package__:
    __package__ = as_package(__file__)

from .bench import plot
from .bench.measure import relative_error
from .bench.report import again, cpu_environment, grid, parser_of, progress, write_whole
from .bench.timing import Timing

OPS = {"absorb_q": (512, 128, "q_out"), "v_up": (128, 512, "v_out")}  # n and k of DeepSeek-V3, the output's name
SIDES = {"front": "absorb_q", "back": "v_up"}  # as `python -m mla_fp8 bench` calls the ops
PEER = "bmm"  # what the ratio column is over: the fastest of these rows
DEFAULT_HEADS, DEFAULT_THREADS = 128, 2
DEFAULT_S = (1, 16, 128)
FP8 = "fp8 activations"
OWN_BOUND = 3e-3  # relative error from the reference: the output's bf16 rounding, 2^-9 at most, 1.7e-3 rms
PEER_BOUND = 4e-3  # from exact arithmetic: bf16 weights and a bf16 output, 1.7e-3 each, and a margin
REPACKED = "[H,K,N]"  # weights that were transposed for torch.bmm; or as the checkpoint has them
SLOW_MS = 20_000.0  # a contender stops short of --rounds once it has run this long in all
MIN_SAMPLES = 5


@dataclass(frozen=True)
class Contender:
    name: str
    bytes: int  # moved by one call, each tensor once
    calls: Sequence[Callable[[], Tensor]]  # one for each copy of the weights
    reference: Tensor | None = None  # of ours, what the reference makes of the same activations


@dataclass(frozen=True)
class Row:
    op: str
    s: int
    heads: int
    contender: str
    samples: int
    ms: float
    p20_ms: float
    p80_ms: float
    min_ms: float
    gbps: float
    error: float  # from exact arithmetic on the checkpoint's blocks
    ratio: float = 0.0  # ms over the fastest torch.bmm's
    reproduce: str = ""  # the command that measures this case again


def size_bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def peer(name: str, dtype: torch.dtype, x: Tensor, dense: Sequence[Tensor], repack: bool) -> Contender:
    """torch.bmm over weights [H,N,K]ᵀ as the checkpoint has them, or repacked to [H,K,N]."""
    a = x.transpose(0, 1).to(dtype).contiguous()
    weights = [w.to(dtype).mT.contiguous() if repack else w.to(dtype).mT for w in dense]
    out = torch.empty(a.shape[0], a.shape[1], weights[0].shape[2], dtype=dtype)

    def call(w: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.bmm(a, w, out=out).transpose(0, 1)

    return Contender(name, size_bytes(a, weights[0], out), [call(w) for w in weights])


def contenders(
    op: str, s: int, heads: int, copies: int, activations: Sequence[str] = MODES
) -> tuple[list[Contender], Tensor]:
    """The op first, with each kind of activations; and the exact product, in fp64."""
    n, k, out_name = OPS[op]
    torch.manual_seed(s)
    x = torch.randn(s, heads, k).bfloat16()
    weight = torch.randn(heads, n, k).mul_(60).clamp_(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(heads, n // 128, k // 128).mul_(1e-3).add_(1e-4)
    dense = reference.dequantize_blocks(weight, scale).float()
    run = getattr(torch.ops.mla_fp8, op).out
    out = torch.empty(s, heads, n, dtype=x.dtype)
    weights = [weight.clone() for _ in range(copies)]

    def own(mode: str) -> Contender:
        def call(w: Tensor) -> Callable[[], Tensor]:
            return lambda: run(x, w, scale, fp8_activations=mode == "fp8", **{out_name: out}) or out

        name = FP8 if mode == "fp8" else f"mla_fp8.{op}"
        want = getattr(reference, op)(x, weight, scale, activations=mode)
        return Contender(name, size_bytes(x, weight, scale, out), [call(w) for w in weights], want)

    peers = [
        peer(f"{name} {PEER} {layout}", dtype, x, [dense.clone() for _ in range(copies)], repack=layout == REPACKED)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for layout in (REPACKED, "[H,N,K]ᵀ")
    ]
    return [*map(own, activations), *peers], reference.exact_product(x, None, weight, scale)


def check(entries: Sequence[Contender], s: int, exact: Tensor) -> list[float]:
    """The error of each from exact arithmetic. Raises: ValueError, where a result is wrong."""
    errors = []
    for entry in entries:
        result = entry.calls[0]()
        errors.append(error := relative_error(result, exact))
        off, bound = error, PEER_BOUND
        if entry.reference is not None:
            off, bound = relative_error(result, entry.reference), OWN_BOUND
        if not off < bound:
            raise ValueError(f"{entry.name} at S={s}: relative error must be below {bound}, got {off:.2e}")
    return errors


def measure(
    op: str,
    s: int,
    heads: int,
    copies: int,
    rounds: int,
    activations: Sequence[str] = MODES,
    tick: Callable[[], object] = lambda: None,
) -> list[Row]:
    entries, exact = contenders(op, s, heads, copies, activations)
    errors = check(entries, s, exact)
    samples: list[list[float]] = [[] for _ in entries]
    for turn in range(rounds):
        tick()
        for entry, times in zip(entries, samples, strict=True):
            if len(times) >= MIN_SAMPLES and sum(times) > SLOW_MS:
                continue
            call = entry.calls[turn % copies]
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
    rows = []
    for entry, times, error in zip(entries, samples, errors, strict=True):
        ms, p20, p80 = astuple(Timing.of(times))
        gbps = entry.bytes / ms / 1e6
        rows.append(Row(op, s, heads, entry.name, len(times), ms, p20, p80, min(times), gbps, error))
    fastest = min(row.ms for row in rows if PEER in row.contender)
    command = repeating(op, s, heads, rounds, activations)
    return [replace(row, ratio=row.ms / fastest, reproduce=command) for row in rows]


def repeating(op: str, s: int, heads: int, rounds: int, activations: Sequence[str] = MODES) -> str:
    """The command that measures this case again."""
    side = next(side for side, one in SIDES.items() if one == op)
    options = {"device": "cpu", "sides": side, "s": s, "heads": heads, "rounds": rounds}
    options |= {"threads": torch.get_num_threads()} | ({} if len(activations) > 1 else {"activations": activations[0]})
    defaults = {"heads": DEFAULT_HEADS, "threads": DEFAULT_THREADS}  # left out, so that the line fits 80 columns
    return again({name: value for name, value in options.items() if value != defaults.get(name)})


def table_of(rows: Sequence[Row], threads: int) -> Table:
    first = rows[0]
    title = f"{first.op}, S = {first.s}, H = {first.heads}, {threads} threads; error from exact arithmetic"
    table = grid(title, "contender", "ms", "p20", "p80", "min", "GB/s", "error", f"x {PEER}")
    table.box, table.padding, table.collapse_padding = box.SIMPLE, (0, 0, 0, 0), True
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        times = [f"{value:.2f}" for value in (row.ms, row.p20_ms, row.p80_ms, row.min_ms)]
        cells = [*times, f"{row.gbps:.1f}", f"{row.error:.1e}", f"{row.ratio:.2f}"]
        table.add_row(row.contender, *cells, style="bold" if row.contender.startswith("mla_fp8") else "")
    return table


def parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, commit=False)
    parser.add_argument("--op", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--s", nargs="+", type=int, default=list(DEFAULT_S), help="tokens")
    parser.add_argument("--heads", nargs="+", type=int, default=[DEFAULT_HEADS])
    parser.add_argument("--threads", type=int, default=DEFAULT_THREADS)
    parser.add_argument("--rounds", type=int, default=50, help="samples of each contender")
    parser.add_argument("--copies", type=int, default=4, help="of the weights, taken in turn")
    parser.add_argument("--activations", choices=MODES, help="of the op; default: both, a row each")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time over S (.svg or .png)")
    return parser


def compare(args: argparse.Namespace, console: Console) -> list[Row]:
    cases = list(itertools.product(args.op, args.heads, args.s))
    activations = (args.activations,) if args.activations else MODES
    rows: list[Row] = []
    with progress(console) as bar:
        task = bar.add_task("", total=len(cases) * args.rounds)
        for op, heads, s in cases:
            bar.update(task, description=f"{op}  S={s} H={heads}")
            tick = lambda: bar.advance(task)  # noqa: E731
            rows += (case := measure(op, s, heads, args.copies, args.rounds, activations, tick))
            console.print(table_of(case, args.threads))
            console.print(f"again: {case[0].reproduce}\n", style="dim", highlight=False, soft_wrap=True)
    return rows


@torch.no_grad()
def main() -> int:
    args, console = parser().parse_args(), Console()
    torch.set_num_threads(args.threads)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        console.print("benchmarks/cpu.py: --plot needs matplotlib")
        return 2
    where = cpu_environment(args.threads)
    try:
        rows = compare(args, console)
    except ValueError as error:
        console.print(f"wrong result: {error}", style="red")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    console.print(", ".join(f"{key} {value}" for key, value in where.items()), style="dim")
    if args.json:
        write_whole(args.json, map(asdict, rows), where)
    if args.plot:
        plot.draw_cpu(args.plot, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
