"""Two modes of gpu.py: what a projection adds between other kernels, and what a call costs the
host.

Chain: producer -> projection -> reader, less producer -> reader. The producer streams 24 MB and
writes q_nope; the reader reads all of q. Both are plain kernels without programmatic dependent
launch. All launches are in one graph, over buffer sets that together exceed L2. With nothing
between, the reader finds q in DRAM and not in L2, which understates what a projection adds: by 2
MB, or 0.7 µs, at S = 16.

Host: µs of dispatch, checks, configuration and launch, as a Python caller pays them. Calls run in
batches short enough for the device's queue to hold, without synchronization inside; contenders take
turns.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from rich.console import Console

import mla_fp8

from . import timing
from .contenders import Contender, fused_triton, ours, torch_bmm
from .measure import buffer_sets, l2_bytes, text_of
from .report import grid, microseconds
from .sides import SIDES, Buffers, Side, rotation, words
from .triton_calls import Shape, move

PRODUCER_BYTES = 24 << 20
READER_WORDS = 1024
SHAPE = Shape(8, 8)
DEFAULT_CHAIN_S, DEFAULT_HOST_S = [1, 4, 16], [1, 16]
SIDES_IN_CHAIN = ("front512", "front576", "front576_fp8")
CHAINS_A_GRAPH = 20
EMPTY, ADD = "nothing between", "q + q"

Calls = dict[str, Callable[[], object]]
Records = list[dict[str, object]]


def neighbours(b: Buffers) -> tuple[Callable[[], None], Callable[[], None]]:
    """The launch before and the launch after."""
    stream = torch.randint(0, 1 << 30, (PRODUCER_BYTES // 4,), dtype=torch.int32, device="cuda")
    q_nope, q, sink = words(b.x_full), words(b.out), torch.empty(READER_WORDS, dtype=torch.int32, device="cuda")
    producer = partial(move, stream, stream, q_nope, (stream.numel(), 0, q_nope.numel()), SHAPE)
    return producer, partial(move, q, q, sink, (0, q.numel(), READER_WORDS), SHAPE)


def in_chain(side: Side, s: int) -> list[Contender]:
    """Each with its first configuration: for the Triton kernel one that suits S."""
    return [*ours(side)[:1], *torch_bmm(side), *fused_triton(side, s)]


def chains(side: Side, s: int, heads: int) -> tuple[dict[str, timing.Captured], dict[str, str]]:
    """A graph a contender, and the reasons of those that failed."""
    sets = buffer_sets(side, s, heads, rotation(side.bytes(s, heads) + PRODUCER_BYTES, l2_bytes()))
    around = [neighbours(b) for b in sets]
    launches = len(sets) * -(-CHAINS_A_GRAPH // len(sets))

    def graph(between: Callable[[Buffers], object]) -> timing.Captured:
        def call(b: Buffers, producer: Callable[[], None], reader: Callable[[], None]) -> None:
            producer()
            between(b)
            reader()

        return timing.capture([partial(call, b, *pair) for b, pair in zip(sets, around, strict=True)], launches)

    captured, failed = {EMPTY: graph(lambda b: None)}, {}
    for contender in in_chain(side, s):
        try:
            captured[contender.name] = graph(partial(contender.call, **contender.configs[0]))
        except Exception as error:
            failed[contender.name] = text_of(error)
    return captured, failed


def chain(options: argparse.Namespace, console: Console) -> tuple[Records, int]:
    rows: Records = []
    for name, heads, s in itertools.product(options.sides, options.heads, options.s or DEFAULT_CHAIN_S):
        if name not in SIDES_IN_CHAIN:
            continue
        captured, failed = chains(SIDES[name], s, heads)
        samples = timing.interleave(captured, options.replays)
        case = {"mode": "chain", "side": name, "s": s, "heads": heads}
        title = f"chain, {name}, S = {s}, H = {heads}"
        table = grid(title, "between producer and reader", "chain µs", "adds µs", "p20", "p80")
        for contender, times in samples.items():
            pairs = zip(times, samples[EMPTY], strict=True)
            whole, adds = timing.Timing.of(times), timing.Timing.of([a - b for a, b in pairs])
            table.add_row(contender, *map(microseconds, (whole.us, adds.us, adds.p20, adds.p80)))
            added = {"adds_us": adds.us, "adds_us_p20": adds.p20, "adds_us_p80": adds.p80}
            rows.append({**case, "contender": contender, "us": whole.us, **added})
        rows += _failures(case, failed, table)
        console.print(table)
    return rows, 0


def _failures(case: Mapping[str, object], failed: Mapping[str, str], table: Any) -> Iterator[dict[str, object]]:
    """They keep their rows, in the record and on the terminal."""
    for contender, reason in failed.items():
        table.add_row(f"{contender}: failed: {reason}")
        yield {**case, "contender": contender, "failed": reason}


def host_calls(s: int, heads: int) -> Calls:
    front, back = (Buffers(SIDES[name], s, heads, {}, seed=0) for name in ("front576", "back_fp8"))
    latent = torch.empty(s, heads, front.side.n, dtype=torch.bfloat16, device="cuda")
    out_scale = front.static_scale
    op, q, a, weight = torch.ops.mla_fp8, front.x_full, front.x.transpose(0, 1), front.w_bf16_t
    absorb, pe, up = (front.x, front.w, front.w_scale), front.pe, (back.x, back.w, back.w_scale)
    return {
        "absorb_q.default(q_nope, w, scale)": lambda: op.absorb_q.default(*absorb),
        "absorb_q.default(q_nope, w, scale, q_pe)": lambda: op.absorb_q.default(*absorb, pe),
        "absorb_q.default(q_nope, w, scale, q_pe, out_scale)": lambda: op.absorb_q.default(*absorb, pe, out_scale),
        "absorb_q.out(q_nope, w, scale, q_out=)": lambda: op.absorb_q.out(*absorb, q_out=latent),
        "mla_fp8.absorb_q(q_nope, w, scale)": lambda: mla_fp8.absorb_q(*absorb),
        "v_up.default(o_latent, w, scale)": lambda: op.v_up.default(*up),
        "v_up_quantized.default(o_latent, w, scale)": lambda: op.v_up_quantized.default(*up),
        "quantize_q_nope.default(q_nope)": lambda: op.quantize_q_nope.default(absorb[0]),
        ADD: lambda: q + q,
        "torch.ops.aten.add.Tensor(q, q)": lambda: torch.ops.aten.add.Tensor(q, q),  # the same by the path of our ops
        "torch.bmm(q_nope, w)": lambda: torch.bmm(a, weight),
        "torch.empty_like(q)": lambda: torch.empty_like(q),
    }


def host_us(calls: Calls, rounds: int) -> tuple[dict[str, timing.Timing], dict[str, str]]:
    measures: dict[str, Callable[[], float]] = {}
    failed = {}
    for name, call in calls.items():
        measure = partial(timing.called_us, call, timing.HOST_CALLS, torch.device("cuda"))
        try:
            measure()
        except Exception as error:
            failed[name] = text_of(error)
        else:
            measures[name] = measure
    samples = timing.in_turn(measures, rounds)
    return {name: timing.Timing.of(times) for name, times in samples.items()}, failed


def host(options: argparse.Namespace, console: Console) -> tuple[Records, int]:
    rows: Records = []
    for heads, s in itertools.product(options.heads, options.s or DEFAULT_HOST_S):
        timings, failed = host_us(host_calls(s, heads), options.replays)
        case = {"mode": "host", "s": s, "heads": heads}
        table = grid(f"host, S = {s}, H = {heads}", "call", "µs", "p20", "p80", f"over {ADD}")
        for name, result in sorted(timings.items(), key=lambda item: item[1].us):
            ratio = result.us / timings[ADD].us
            table.add_row(name, *map(microseconds, (result.us, result.p20, result.p80)), f"{ratio:.2f}x")
            times = {"us": result.us, "us_p20": result.p20, "us_p80": result.p80}
            rows.append({**case, "contender": name, **times, "over_q_plus_q": ratio})
        rows += _failures(case, failed, table)
        console.print(table)
    return rows, 0
