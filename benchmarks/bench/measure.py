"""A side at one S and H on a GPU: check every contender, tune, time all of them in turn."""

import functools
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mla_fp8.formats import MODES

from . import timing, triton_calls
from .contenders import Contender, Missing, contenders, own_tolerance
from .sides import Buffers, Side, rotation
from .triton_calls import has_triton

FLOOR = "floor"
QUICK_CONFIGS = 2


@dataclass(kw_only=True)
class Timed:
    """What every row of a record says of its check and its time."""

    status: str = "ok"  # or "wrong", "failed", "not installed"
    reason: str = ""
    relative_error: float | None = None  # from exact arithmetic
    tolerance: float | None = None
    us: float | None = None
    us_p20: float | None = None
    us_p80: float | None = None
    gbps: float | None = None

    def take(self, samples: Sequence[float], moved_bytes: int) -> None:
        result = timing.Timing.of(samples)
        self.us, self.us_p20, self.us_p80 = result.us, result.p20, result.p80
        self.gbps = moved_bytes / result.us / 1e3


@dataclass
class Row(Timed):
    """One contender of one case; a line of the JSON file together with the environment."""

    side: str
    s: int
    heads: int
    contender: str
    ours: bool = False
    config: str = ""
    bytes: int = 0
    percent_of_stream: float | None = None
    over_floor: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)  # this time over each other contender's
    reproduce: str = ""  # the command that measures this case again


class WrongResult(Exception):
    pass


def text_of(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def config_text(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in config.items())


def relative_error(got: Tensor, want: Tensor) -> float:
    """Of the Frobenius norm; NaN, which is below no bound, where anything is NaN."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def buffer_sets(side: Side, s: int, heads: int, count: int, device: str = "cuda") -> list[Buffers]:
    scratch: dict[str, Tensor] = {}
    return [Buffers(side, s, heads, scratch, seed, device) for seed in range(count)]


def capture_all(
    calls: Mapping[str, Sequence[Callable[[], object]]],
    launches: Callable[[str], int],
    rows: Mapping[str, Timed],
) -> dict[str, timing.Captured]:
    """A graph a contender; one that fails in it is a failed row."""
    captured = {}
    for name, ones in calls.items():
        try:
            captured[name] = timing.capture(ones, launches(name))
        except Exception as error:  # whatever a library throws; the others still run
            rows[name].status, rows[name].reason = "failed", f"in a CUDA graph: {text_of(error)}"
    return captured


def release() -> None:
    """Give memory back before the next case, whose tensors have other sizes."""
    gc.collect()
    torch.cuda.empty_cache()


@dataclass
class Case:
    side: Side
    s: int
    heads: int
    device: str = "cuda"
    activations: Sequence[str] = MODES  # of ours
    rows: dict[str, Row] = field(default_factory=dict)
    runnable: dict[str, Contender] = field(default_factory=dict)
    calls: dict[str, Callable[[Buffers], object]] = field(default_factory=dict)  # as tuned

    @property
    def bytes(self) -> int:
        return self.side.bytes(self.s, self.heads)

    @property
    def title(self) -> str:
        return f"{self.side.name}  S={self.s} H={self.heads}"

    def sets(self) -> list[Buffers]:
        """As many as the rotation through L2 needs."""
        return buffer_sets(self.side, self.s, self.heads, rotation(self.bytes, l2_bytes()), self.device)

    def _row(self, contender: Contender | Missing) -> Row:
        row = self.rows[contender.name] = Row(self.side.name, self.s, self.heads, contender.name, contender.ours)
        if isinstance(contender, Missing):
            row.status, row.reason = contender.status, contender.reason
        else:
            row.bytes, row.tolerance = self.bytes, contender.tolerance
        return row

    def check(self, quick: bool) -> dict[str, list[dict[str, Any]]]:
        """Every configuration of every contender against exact arithmetic, ours against the reference too; those that
        are right.

        Raises: WrongResult. A contender that raises instead is a failed row.
        """
        (buffers,) = buffer_sets(self.side, self.s, self.heads, 1, self.device)
        exact, own_reference = buffers.exact(), functools.cache(buffers.own_reference)
        right: dict[str, list[dict[str, Any]]] = {}
        for contender in contenders(self.side, self.s, self.activations):
            row = self._row(contender)
            if isinstance(contender, Missing):
                continue
            for config in contender.configs[:QUICK_CONFIGS] if quick else contender.configs:
                try:
                    buffers.poison(contender.layout)
                    contender.call(buffers, **config)
                    result = buffers.decode(contender.layout)
                except Exception as failure:  # whatever a library throws; the others still run
                    row.reason = text_of(failure)
                    continue
                row.relative_error = relative_error(result, exact)
                bounds = [(row.relative_error, contender.tolerance)]
                if contender.ours:
                    off = relative_error(result, own_reference(contender.activations))
                    bounds.append((off, own_tolerance(self.side)))
                for error, allowed in bounds:
                    if not error < allowed:
                        raise WrongResult(
                            f"{self.title}: {contender.name} {config_text(config)}: relative error {error:.2e}, "
                            f"allowed {allowed:.2e} (NaN: not all of the output was written)"
                        )
                right.setdefault(contender.name, []).append(config)
                self.runnable[contender.name] = contender
            row.status, row.reason = ("ok", "") if contender.name in right else ("failed", row.reason)
        del buffers
        release()
        return right

    def tune(self, right: Mapping[str, list[dict[str, Any]]], quick: bool) -> None:
        """Chooses each contender's fastest configuration, and the floor's."""
        sets = self.sets()
        for name, configs in right.items():
            ways = {config_text(one): partial(self.runnable[name].call, **one) for one in configs}
            self._choose(sets, name, ways)
        row = self.rows[FLOOR] = Row(self.side.name, self.s, self.heads, FLOOR, bytes=self.bytes)
        if has_triton():
            row.status, row.reason = "not installed", has_triton()
        else:
            shapes = triton_calls.shapes(quick)
            self._choose(sets, FLOOR, {name: partial(triton_calls.floor, shape=one) for name, one in shapes.items()})
        del sets
        release()

    def _choose(self, sets: Sequence[Buffers], name: str, ways: Mapping[str, Callable[[Buffers], object]]) -> None:
        best = next(iter(ways))
        if len(ways) > 1:
            best = timing.best({way: self._capture(sets, call) for way, call in ways.items()})
        self.rows[name].config, self.calls[name] = best, ways[best]

    def compile(self, quick: bool) -> None:
        """Everything once, for the caches on disk that Triton and others keep."""
        self.check(quick)
        if not has_triton():
            for shape in triton_calls.shapes(quick).values():
                triton_calls.floor(buffer_sets(self.side, self.s, self.heads, 1)[0], shape)

    def _capture(self, sets: Sequence[Buffers], call: Callable[[Buffers], object]) -> timing.Captured:
        return timing.capture([partial(call, one) for one in sets], timing.launches_for(self.bytes, len(sets)))

    def time(self, replays: int, stream_gbps: float, tick: Callable[[], object]) -> list[Row]:
        sets = self.sets()
        calls = {name: [partial(call, one) for one in sets] for name, call in self.calls.items()}
        launches = timing.launches_for(self.bytes, len(sets))
        captured = capture_all(calls, lambda name: launches, self.rows)
        for name, samples in timing.interleave(captured, replays, tick).items():
            row = self.rows[name]
            row.take(samples, self.bytes)
            row.percent_of_stream = 100 * (row.gbps or 0) / stream_gbps
        times = {name: row.us for name, row in self.rows.items() if row.us is not None}
        for name, us in times.items():
            self.rows[name].over_floor = us / times[FLOOR] if FLOOR in times else None
            self.rows[name].ratios = {other: us / other_us for other, other_us in times.items() if other != name}
        del captured, calls, sets
        release()
        return list(self.rows.values())
