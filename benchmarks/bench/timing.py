"""Times launches that find nothing in L2, as CUDA graphs over rotated buffers; and calls, as the
host sees them.

Contenders take turns in both.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

GRAPH_US = 1000  # of device time that one graph aims at, so that starting it weighs little
MIN_LAUNCHES, MAX_LAUNCHES = 2, 48
GUESSED_GBPS, GUESSED_LAUNCH_US = 2500, 4
REPLAYS, QUICK_REPLAYS = 50, 10
TUNING_REPLAYS = 7
HOST_CALLS = 200  # in a batch, few enough for the device's queue to hold
HEAD_START_CYCLES = 1_000_000  # the device idles while the host fills its queue, so that no event waits for the host


@dataclass(frozen=True)
class Timing:
    us: float  # or ms, as its samples
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), p20, p80)


@dataclass(frozen=True)
class Captured:
    graph: torch.cuda.CUDAGraph
    launches: int


def launches_for(moved_bytes: int, sets: int) -> int:
    """Launches a graph: about GRAPH_US in all, each buffer set equally often."""
    expected_us = moved_bytes / GUESSED_GBPS / 1e3 + GUESSED_LAUNCH_US
    wanted = min(max(GRAPH_US / expected_us, MIN_LAUNCHES), MAX_LAUNCHES)
    return sets * max(1, round(wanted / sets))


def capture(
    calls: Sequence[Callable[[], object]], launches: int, error_mode: str = "global", firsts: int | None = None
) -> Captured:
    """A graph of `launches` calls, which are taken in turn; all of them, or `firsts`, are made once before."""
    for call in calls[:firsts]:  # compiles, loads and allocates what a first call does
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=error_mode):
        for i in range(launches):
            calls[i % len(calls)]()
    graph.replay()
    torch.cuda.synchronize()
    return Captured(graph, launches)


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def interleave(
    contenders: Mapping[str, Captured], replays: int, tick: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """µs a launch of each, one sample a replay; the order turns by one with every round."""
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(replays + 1):
        torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        marks = {}
        for name in names[i % len(names) :] + names[: i % len(names)]:
            begin, end = event(), event()
            begin.record()
            contenders[name].graph.replay()
            end.record()
            marks[name] = begin, end
        torch.cuda.synchronize()
        if i:  # the first round warms up
            for name, (begin, end) in marks.items():
                samples[name].append(begin.elapsed_time(end) * 1e3 / contenders[name].launches)
        tick()
    return samples


def best(candidates: Mapping[str, Captured]) -> str:
    """The fastest, from a few interleaved replays."""
    samples = interleave(candidates, TUNING_REPLAYS)
    return min(candidates, key=lambda name: statistics.median(samples[name]))


def called_us(call: Callable[[], object], calls: int, device: torch.device, wait: bool = False) -> float:
    """µs a call of several without a pause: the host's, or with `wait` until a GPU is done too."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    if wait:
        synchronize()
    return (time.perf_counter() - began) * 1e6 / calls


def in_turn(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """`rounds` samples of each measure, without Python's garbage collector in between."""
    samples: dict[str, list[float]] = {name: [] for name in measures}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, measure in measures.items():
                samples[name].append(measure())
    finally:
        gc.enable()
    return samples
