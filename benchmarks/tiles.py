"""Times every tile that can run a problem, beside the one that select_config chooses, and
torch.bmm.

    python benchmarks/tiles.py                            the published list of (H, S): some thousand cases
    python benchmarks/tiles.py --s 1,64 --heads 16,128 --sides front512,back
    python benchmarks/tiles.py --json tiles.json --resume --budget-s 500     goes on where a run before was cut off
    python benchmarks/tiles.py --list                     the cases, and measures nothing

Rotation through L2, graphs and interleaving as in gpu.py; a set's tensors are cut from one pool,
which makes a case take tens of milliseconds. The chosen tile is checked against the reference,
every other must have its bits. A tile that takes SLOW times as long as the fastest in a first round
is not timed further. Beside exact activations and bf16 output stands torch.bmm into the output (into a view of
q, and a copy of q_pe), with the weights in the faster of two layouts. Tiles for unaligned tensors
are left out. Status 1: a result is wrong, or a choice takes over LIMIT of the best tile's time; 2:
no GPU; 3: the budget is spent.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from mla_fp8 import reference
from mla_fp8.cli.bench import as_package
from mla_fp8.config import Device, candidates, device_limits, forced_tile, select_config
from mla_fp8.formats import E4M3, FP8_MAX, MODES

if not __package__:
    __package__ = as_package(__file__)

from .bench import report, tables, timing
from .bench.contenders import TORCH, WEIGHT_LAYOUTS, Contender, ours, own_tolerance
from .bench.measure import WrongResult, l2_bytes, relative_error
from .bench.sides import BF16, FP32, SIDES, Buffers, Side, rotation, round_up
from .bench.tables import LIMIT
from .gpu import side_names

HEADS = [4, 5, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128]
S = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 200, 256, 384, 512, 700, 1024, 2048, 8192]
SLOW = 1.7
REPLAYS = 7
ALIGN_BYTES = 1024  # of what is cut from a pool
PIECE = 1 << 25  # random elements, repeated
POOL_BYTES = {"x": 5 << 28, "w": 1 << 29, "w_bf16": 1 << 29, "scale": 1 << 28, "quantized": 1 << 29, "out": 3 << 29}


class Pools:
    """Memory by role, filled once. A case cuts its sets from it, and wraps around at its end."""

    def __init__(self, device: str = "cuda", divisor: int = 1) -> None:
        self.device, self.static_scale = device, torch.full((1,), 0.02, device=device)
        random = torch.Generator(device=device).manual_seed(0)
        values = torch.randn(PIECE // divisor, generator=random, device=device)
        scales = (torch.rand(PIECE // divisor, generator=random, device=device) + 0.5) * 2**-11
        bf16, e4m3 = values.bfloat16(), (values * FP8_MAX / 4).clamp(-FP8_MAX, FP8_MAX).to(E4M3)
        content = {"x": bf16, "w": e4m3, "w_bf16": bf16, "scale": scales, "quantized": e4m3, "out": e4m3}
        self.memory = {}
        for role, one in content.items():
            piece = one.view(torch.uint8)
            self.memory[role] = piece.repeat(math.ceil(POOL_BYTES[role] / divisor / len(piece)))
        self.begin()

    def begin(self) -> None:
        self._at = dict.fromkeys(self.memory, 0)

    def cut(self, role: str, *shape: int, dtype: torch.dtype) -> Tensor:
        size, pool = math.prod(shape) * dtype.itemsize, self.memory[role]
        if self._at[role] + size > len(pool):
            self._at[role] = 0
        begin = self._at[role]
        self._at[role] = begin + round_up(size, ALIGN_BYTES)
        return pool[begin : begin + size].view(dtype).view(shape)


class PooledBuffers(Buffers):
    """Buffers cut from pools. Their bf16 weights are not those of `w`: they are only timed."""

    def __init__(self, pools: Pools, side: Side, s: int, heads: int) -> None:
        super().__init__(side, s, heads, {}, 0, pools.device)
        self._pools, self.static_scale = pools, pools.static_scale
        if side.op == "bmm":
            scale = self.make("scale", heads, 1, round_up(s, 4), dtype=FP32).mT[:, :s]
            self.quantized = self.make("quantized", heads, s, side.k, dtype=E4M3), scale

    def make(self, role: str, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return self._pools.cut(role, *shape, dtype=dtype)

    @cached_property
    def w_bf16(self) -> Tensor:
        return self.make("w_bf16", self.heads, self.side.n, self.side.k)

    @cached_property
    def w_bf16_t(self) -> Tensor:
        return self.make("w_bf16", self.heads, self.side.k, self.side.n)

    def own_reference(self, activations: str = "exact") -> Tensor:
        if self.side.op != "bmm":
            return super().own_reference(activations)
        tokens, (val, scale) = self.sample(), self.quantized
        return reference.bmm(val[:, tokens], scale[:, tokens], self.w, self.w_scale).transpose(0, 1).double()

    def bits_of(self, contender: Contender) -> list[Tensor]:
        """All that its call writes."""
        self.poison(contender.layout)
        contender.call(self)
        return [self.result(contender.layout).view(torch.uint8), self.out_group_scale.view(torch.int32)]


def check(contender: Contender, buffers: PooledBuffers, symbols: Iterable[str], where: str) -> None:
    """The chosen tile against the reference, the others' bits against its. Raises: WrongResult."""
    want = [written.clone() for written in buffers.bits_of(contender)]
    error = relative_error(buffers.decode(contender.layout), buffers.own_reference(contender.activations))
    if not error < (allowed := own_tolerance(buffers.side)):
        raise WrongResult(f"{where}: relative error {error:.2e}, allowed {allowed:.2e}")
    for symbol in symbols:
        with forced_tile(symbol):
            if not all(torch.equal(*pair) for pair in zip(buffers.bits_of(contender), want, strict=True)):
                raise WrongResult(f"{where}: {symbol} gives other bits than the chosen tile")


def compare(pools: Pools, side: Side, s: int, heads: int, activations: str, device: Device) -> dict[str, object]:
    """A row: median µs of each tile and of torch.bmm, which tile is chosen, and for what limits."""
    problem = side.problem(s, heads, activations)
    kept = {one.config.tile.symbol: one.config for one in candidates(problem, device) if one.kept}
    chosen = select_config(problem, device).tile.symbol
    symbols = [name for name, one in kept.items() if one.tile.align_bytes == problem.align_bytes or name == chosen]
    pools.begin()
    sets = [PooledBuffers(pools, side, s, heads) for _ in range(rotation(side.bytes(s, heads), l2_bytes()))]
    launches = timing.launches_for(side.bytes(s, heads), len(sets))
    own = ours(side, [activations])[0]
    check(own, sets[0], symbols, f"{side.name} {activations}  S={s} H={heads}")
    captured = {}
    for symbol in symbols:
        with forced_tile(symbol):
            captured[symbol] = timing.capture([partial(own.call, one) for one in sets], launches, firsts=1)
    if side.out_bytes == 2 and side.op != "bmm" and activations == "exact":
        call = TORCH.into_view_and_copy if side.rope else TORCH.into_output
        for config in WEIGHT_LAYOUTS:
            peer = [partial(call, one, **config) for one in sets]
            captured[f"{tables.PEER} {config['weights']}"] = timing.capture(peer, launches, firsts=1)
    case: dict[str, object] = {"side": side.name, "activations": activations, "heads": heads, "s": s}
    case |= {"chosen": chosen, "launches": launches}
    modelled = {name: round(one.modelled_us, 3) for name, one in kept.items()}
    limits = {name: getattr(device, name) for name in Device._fields}
    return case | take_times(captured, chosen) | {"modelled_us": modelled, "device": limits}


def take_times(captured: Mapping[str, timing.Captured], chosen: str) -> dict[str, object]:
    """`us`: medians; `probed_us`: a sample of what is slow; `spread`: the worst (max / min - 1)."""
    probed = {name: samples[0] for name, samples in timing.interleave(captured, 1).items()}
    limit = SLOW * min(probed.values())
    live = {name: one for name, one in captured.items() if probed[name] < limit or name == chosen}
    samples = timing.interleave(live, REPLAYS)
    return {
        "us": {name: round(statistics.median(times), 3) for name, times in samples.items()},
        "probed_us": {name: round(us, 3) for name, us in probed.items() if name not in live},
        "spread": round(max(max(times) / min(times) for times in samples.values()) - 1, 4),
    }


def over_best(row: Mapping[str, Any]) -> float:
    return float(row["us"][row["chosen"]] / min(tables.tile_times(row).values()))


def parser() -> argparse.ArgumentParser:
    parser = report.parser_of(__doc__)
    parser.add_argument("--s", type=report.integers, default=S)
    parser.add_argument("--heads", type=report.integers, default=HEADS)
    parser.add_argument("--sides", type=side_names, default=list(SIDES))
    parser.add_argument("--activations", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--list", action="store_true", help="print the cases and measure nothing")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --json has, and add those it lacks")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="begin no case after so many seconds")
    return parser


@torch.no_grad()
def main() -> int:
    options, console = parser().parse_args(), report.console_of()
    modes = [(side, mode) for side in options.sides for mode in (options.activations if side != "gemm" else ["fp8"])]
    cases = list(itertools.product(options.heads, options.s, modes))
    if options.list:
        for heads, s, (name, mode) in cases:
            console.print(f"{name:<13} {mode:<5} H={heads} S={s}", highlight=False)
        return 0
    if report.needs_gpu(console):
        return 2
    began, facts = time.monotonic(), report.environment(options.commit)
    rows = report.read(options.json) if options.resume and options.json and options.json.exists() else []
    done = {(row["heads"], row["s"], (row["side"], row["activations"])) for row in rows}
    device, pools = device_limits(), Pools()
    spent = False
    for heads, s, (name, mode) in track([case for case in cases if case not in done], "tiles", console=console):
        if spent := time.monotonic() - began > options.budget_s:
            break
        try:
            rows.append({**compare(pools, SIDES[name], s, heads, mode, device), **facts})
        except WrongResult as error:
            console.print(f"wrong result: {error}", style="bold red", markup=False)
            return 1
        if options.json:  # after every case: a run that is cut off keeps what it has
            append(options.json, rows[-1], anew=len(rows) == 1)
    if rows:
        console.print(tables.tiles(rows), markup=False, highlight=False, soft_wrap=True)
    return 3 if spent else int(any(over_best(row) > LIMIT for row in rows))


def append(path: Path, row: Mapping[str, Any], anew: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if anew else "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
