"""One case of the GPU benchmark, a side at one S and H: check every contender, tune, time all of them in turn."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import floor
import timing
import torch
from buffers import Buffers
from contenders import Contender, Missing, fused_triton, ours, torch_bmm
from peers import peers
from sides import Side, rotation
from triton_calls import has_triton, triton_configs

FLOOR = "floor"
QUICK_CONFIGS = 2


@dataclass
class Row:
    """One contender of one case; a line of the JSON file together with the environment."""

    side: str
    s: int
    heads: int
    contender: str
    ours: bool = False
    status: str = "ok"  # or "failed", "not installed"
    reason: str = ""
    config: str = ""
    bytes: int = 0
    relative_error: float | None = None
    tolerance: float | None = None
    us: float | None = None
    us_p20: float | None = None
    us_p80: float | None = None
    gbps: float | None = None
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


def config_text(config: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in config.items())


@dataclass
class Case:
    side: Side
    s: int
    heads: int
    device: str = "cuda"
    rows: dict[str, Row] = field(default_factory=dict)
    runnable: dict[str, Contender] = field(default_factory=dict)
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)  # configuration
    floor_shape: floor.Shape | None = None

    @property
    def bytes(self) -> int:
        return self.side.bytes(self.s, self.heads)

    @property
    def title(self) -> str:
        return f"{self.side.name}  S={self.s} H={self.heads}"

    def sets(self, count: int | None = None) -> list[Buffers]:
        """As many as the rotation through L2 needs, or `count`."""
        if count is None:
            count = rotation(self.bytes, torch.cuda.get_device_properties(0).L2_cache_size)
        scratch: dict[str, torch.Tensor] = {}
        return [Buffers(self.side, self.s, self.heads, scratch, seed, self.device) for seed in range(count)]

    def launches(self, sets: int) -> int:
        return timing.launches_for(self.bytes, sets)

    def contenders(self) -> list[Contender | Missing]:
        easy: list[Contender | Missing] = list(fused_triton(self.side))
        if has_triton():
            easy = [Missing(contender.name, "not installed", has_triton()) for contender in easy]
        else:
            configs = triton_configs(self.side, self.s)
            easy = [replace(one, configs=configs) for one in easy if isinstance(one, Contender)]
        return [*ours(self.side), *torch_bmm(self.side), *easy, *peers(self.side)]

    def check(self, quick: bool) -> dict[str, list[dict[str, Any]]]:
        """Every configuration of every contender against its reference; those that are right.

        Raises: WrongResult. A contender that raises instead is a failed row.
        """
        buffers = self.sets(1)[0]
        exact, quantized = buffers.exact(), buffers.quantized_reference()
        right: dict[str, list[dict[str, Any]]] = {}
        for contender in self.contenders():
            row = self.rows[contender.name] = Row(self.side.name, self.s, self.heads, contender.name, contender.ours)
            if isinstance(contender, Missing):
                row.status, row.reason = contender.status, contender.reason
                continue
            row.bytes, row.tolerance = self.bytes, contender.tolerance
            for config in contender.configs[:QUICK_CONFIGS] if quick else contender.configs:
                try:
                    buffers.poison(contender.layout)
                    contender.call(buffers, **config)
                    result = buffers.decode(contender.layout)
                except Exception as error:  # whatever a library throws; the others still run
                    row.reason = text_of(error)
                    continue
                want = quantized if contender.ours else exact
                row.relative_error = float((result - want).norm() / want.norm())
                if not row.relative_error < contender.tolerance:
                    got, allowed = f"{row.relative_error:.2e}", f"{contender.tolerance:.2e}"
                    raise WrongResult(
                        f"{self.title}: {contender.name} {config_text(config)}: relative error {got}, allowed {allowed}"
                        " (NaN: not all of the output was written)"
                    )
                right.setdefault(contender.name, []).append(config)
                self.runnable[contender.name] = contender
            row.status, row.reason = ("ok", "") if contender.name in right else ("failed", row.reason)
        del buffers
        release()
        return right

    def tune(self, right: dict[str, list[dict[str, Any]]], quick: bool) -> None:
        """Chooses each contender's fastest configuration, and the floor's."""
        sets = self.sets()
        for name, configs in right.items():
            fastest = configs[0]
            if len(configs) > 1:
                contender = self.runnable[name]
                captured = {config_text(config): self._capture(sets, contender, config) for config in configs}
                best = timing.best(captured)
                fastest = next(config for config in configs if config_text(config) == best)
            self.chosen[name] = fastest
            self.rows[name].config = config_text(fastest)
        row = self.rows[FLOOR] = Row(self.side.name, self.s, self.heads, FLOOR, bytes=self.bytes)
        if has_triton():
            row.status, row.reason = "not installed", has_triton()
        else:
            shapes = {str(shape): shape for shape in floor.shapes(quick)}
            row.config = timing.best({name: self._capture_floor(sets, shape) for name, shape in shapes.items()})
            self.floor_shape = shapes[row.config]
        del sets
        release()

    def compile(self, quick: bool) -> None:
        """Everything once, for the caches on disk that Triton and others keep."""
        self.check(quick)
        if not has_triton():
            buffers = self.sets(1)[0]
            for shape in floor.shapes(quick):
                floor.floor_call(buffers, shape)()

    def _capture(self, sets: Sequence[Buffers], contender: Contender, config: dict[str, Any]) -> timing.Captured:
        calls = [partial(contender.call, buffers, **config) for buffers in sets]
        return timing.capture(calls, self.launches(len(sets)))

    def _capture_floor(self, sets: Sequence[Buffers], shape: floor.Shape) -> timing.Captured:
        return timing.capture([floor.floor_call(buffers, shape) for buffers in sets], self.launches(len(sets)))

    def time(self, replays: int, stream_gbps: float, tick: Callable[[], object]) -> list[Row]:
        sets = self.sets()
        captured = {}
        for name, config in self.chosen.items():
            try:
                captured[name] = self._capture(sets, self.runnable[name], config)
            except Exception as error:
                self.rows[name].status, self.rows[name].reason = "failed", f"in a CUDA graph: {text_of(error)}"
        if self.floor_shape is not None:
            captured[FLOOR] = self._capture_floor(sets, self.floor_shape)
        for name, samples in timing.interleave(captured, replays, tick).items():
            row, result = self.rows[name], timing.Timing.of(samples)
            row.us, row.us_p20, row.us_p80 = result.us, result.p20, result.p80
            row.gbps = self.bytes / result.us / 1e3
            row.percent_of_stream = 100 * row.gbps / stream_gbps
        times = {name: row.us for name, row in self.rows.items() if row.us is not None}
        for name, us in times.items():
            self.rows[name].over_floor = us / times[FLOOR] if FLOOR in times else None
            self.rows[name].ratios = {other: us / other_us for other, other_us in times.items() if other != name}
        del captured, sets
        release()
        return list(self.rows.values())


def release() -> None:
    """Give memory back before the next case, whose tensors have other sizes."""
    gc.collect()
    torch.cuda.empty_cache()
