"""What a projection adds between its neighbours: producer -> projection -> reader, less producer -> reader.

The producer streams 24 MB and writes q_nope; the reader reads all of q. Both are plain kernels without programmatic
dependent launch. All launches are in one graph, over buffer sets that together exceed L2. With nothing between, the
reader finds q in DRAM and not in L2, which understates what a projection adds: by 2 MB, or 0.7 µs, at S = 16.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import floor
import timing
import torch
from buffers import Buffers, words
from contenders import Contender, fused_triton, ours, torch_bmm
from measure import text_of
from report import microseconds
from rich.console import Console
from rich.table import Table
from sides import SIDES, Side, rotation
from triton_calls import triton_configs

PRODUCER_BYTES = 24 << 20
READER_WORDS = 1024
SHAPE = floor.Shape(8, 8)
DEFAULT_S = [1, 4, 16]
SIDES_IN_CHAIN = ("front512", "front576", "front576_fp8")
CHAINS_A_GRAPH = 20
EMPTY = "nothing between"


def neighbours(b: Buffers) -> tuple[Callable[[], None], Callable[[], None]]:
    """The launch before and the launch after."""
    stream = torch.randint(0, 1 << 30, (PRODUCER_BYTES // 4,), dtype=torch.int32, device="cuda")
    q_nope, q, sink = words(b.x_full), words(b.out), torch.empty(READER_WORDS, dtype=torch.int32, device="cuda")
    producer = partial(floor.move, stream, stream, q_nope, (stream.numel(), 0, q_nope.numel()), SHAPE)
    return producer, partial(floor.move, q, q, sink, (0, q.numel(), READER_WORDS), SHAPE)


def candidates(side: Side, s: int) -> list[Contender]:
    """Each with one configuration: for the Triton kernel the first that suits S."""
    easy = [replace(contender, configs=triton_configs(side, s)) for contender in fused_triton(side)]
    return [replace(one, configs=one.configs[:1]) for one in (*ours(side)[:1], *torch_bmm(side), *easy)]


def chains(side_name: str, s: int, heads: int) -> tuple[dict[str, timing.Captured], dict[str, str]]:
    """A graph a contender, and the reasons of those that failed."""
    side = SIDES[side_name]
    sets_needed = rotation(side.bytes(s, heads) + PRODUCER_BYTES, torch.cuda.get_device_properties(0).L2_cache_size)
    scratch: dict[str, torch.Tensor] = {}
    sets = [Buffers(side, s, heads, scratch, seed) for seed in range(sets_needed)]
    around = [neighbours(b) for b in sets]
    launches = sets_needed * -(-CHAINS_A_GRAPH // sets_needed)

    def graph(between: Callable[[Buffers], object]) -> timing.Captured:
        def call(b: Buffers, producer: Callable[[], None], reader: Callable[[], None]) -> None:
            producer()
            between(b)
            reader()

        return timing.capture([partial(call, b, *pair) for b, pair in zip(sets, around, strict=True)], launches)

    captured, failed = {EMPTY: graph(lambda b: None)}, {}
    for contender in candidates(side, s):
        try:
            captured[contender.name] = graph(partial(contender.call, **contender.configs[0]))
        except Exception as error:
            failed[contender.name] = text_of(error)
    return captured, failed


def run(options: argparse.Namespace, console: Console) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for side in (name for name in options.sides if name in SIDES_IN_CHAIN):
        for heads in options.heads:
            for s in options.s or DEFAULT_S:
                captured, failed = chains(side, s, heads)
                samples = timing.interleave(captured, options.replays)
                table = Table(title=f"chain, {side}, S = {s}, H = {heads}", title_justify="left")
                for column in ("between producer and reader", "chain µs", "adds µs", "p20", "p80"):
                    table.add_column(column, justify="left" if column.startswith("between") else "right")
                for name, times in samples.items():
                    pairs = zip(times, samples[EMPTY], strict=True)
                    chain, adds = timing.Timing.of(times), timing.Timing.of([a - b for a, b in pairs])
                    table.add_row(name, *map(microseconds, (chain.us, adds.us, adds.p20, adds.p80)))
                    row = {"mode": "chain", "side": side, "s": s, "heads": heads, "contender": name, "us": chain.us}
                    rows.append({**row, "adds_us": adds.us, "adds_us_p20": adds.p20, "adds_us_p80": adds.p80})
                for name, reason in failed.items():
                    table.add_row(f"{name}: failed: {reason}")
                    rows.append(
                        {"mode": "chain", "side": side, "s": s, "heads": heads, "contender": name, "failed": reason}
                    )
                console.print(table)
    return rows
