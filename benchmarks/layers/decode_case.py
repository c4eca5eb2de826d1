"""The parts of one decode step at one shape: check each, then time all of them in turn.

Attention over cached latents is by whoever is installed. Each backend plans for a shape and gives a
function of the step's tensors: q [S,H,576] and cache [S,T,576], both bf16 and contiguous ->
o_latent [S,H,512].
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mla_fp8 import reference
from mla_fp8.attention import attend_latents
from mla_fp8.attention.backends import LATENT, PLANNERS, ROPE, WIDTH, Call, NotInstalled

from ..bench import timing
from ..bench.contenders import OWN_TOLERANCE
from ..bench.measure import Timed, capture_all, l2_bytes, relative_error, release, text_of
from ..bench.sides import SIDES, Buffers, rotation

FRONT, BACK = SIDES["front576"], SIDES["back"]
# Softmax weights rounded to bf16, parts of a split context too, and the result: 1.7e-3 each, and a
# margin.
ATTENTION_TOLERANCE = 6e-3
SAMPLED_SEQUENCES = 4
OWN, OWN_PARTS = "mla_fp8", ("absorb_q", "v_up")
HEAD_DIM = 128
SCALE = (HEAD_DIM + ROPE) ** -0.5
Attend = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    batch: int
    context: int
    heads: int
    device: str = "cuda"

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context}, H = {self.heads}"

    @property
    def cache_bytes(self) -> int:
        return self.batch * self.context * WIDTH * 2

    @property
    def bytes(self) -> int:
        """What attention cannot avoid: the cache and q once, o_latent once."""
        return self.cache_bytes + self.batch * self.heads * (WIDTH + LATENT) * 2


def _split(cache: Tensor) -> Sequence[Tensor]:
    return cache.split([LATENT, ROPE], dim=-1)


def pytorch(shape: Shape) -> Attend:
    return lambda q, cache: attend_latents(q.unsqueeze(1), *_split(cache), scale=SCALE, backend="torch")[:, 0]


_compiled = torch.compile(attend_latents, dynamic=True, fullgraph=True)


def compiled(shape: Shape) -> Attend:
    return lambda q, cache: _compiled(q.unsqueeze(1), *_split(cache), scale=SCALE)[:, 0]


def library(name: str) -> Callable[[Shape], Attend]:
    """Planned once, before any time is taken: a server shares a step's plan among all layers."""

    def planned(shape: Shape) -> Attend:
        extents = shape.batch, 1, shape.heads, shape.context, shape.context
        call = Call(*extents, SCALE, torch.bfloat16, torch.device(shape.device))
        attend = PLANNERS[name](call.device)(call)
        return lambda q, cache: attend(q.unsqueeze(1), *_split(cache))[:, 0]

    return planned


BACKENDS: dict[str, tuple[str, Callable[[Shape], Attend]]] = {
    "torch": ("attend_latents", pytorch),
    "compiled": ("attend_latents, torch.compile", compiled),
    "flash_mla": ("FlashMLA", library("flash_mla")),
    "flashinfer": ("FlashInfer", library("flashinfer")),
}


@dataclass
class Part(Timed):
    """A row of the results."""

    batch: int
    context: int
    heads: int
    part: str  # absorb_q, attention, v_up, step
    backend: str
    share: float | None = None  # of absorb_q + the fastest attention + v_up


class WrongStep(Exception):
    pass


class Step:
    """One set of a step's tensors."""

    def __init__(self, shape: Shape, cache: Tensor, seed: int) -> None:
        self.front = Buffers(FRONT, shape.batch, shape.heads, {}, seed, shape.device)
        self.back = Buffers(BACK, shape.batch, shape.heads, {}, seed, shape.device)
        self.cache = cache

    def absorb(self) -> Tensor:
        b = self.front
        torch.ops.mla_fp8.absorb_q.out(b.x, b.w, b.w_scale, b.pe, None, q_out=b.out)
        return b.out

    def up(self, o_latent: Tensor | None = None) -> None:
        b = self.back
        torch.ops.mla_fp8.v_up.out(b.x if o_latent is None else o_latent, b.w, b.w_scale, v_out=b.out)

    def attend(self, attention: Attend) -> Tensor:
        return attention(self.front.out, self.cache)

    def whole(self, attention: Attend) -> None:
        self.up(attention(self.absorb(), self.cache))


def make_cache(shape: Shape, seed: int) -> Tensor:
    random = torch.Generator(device=shape.device).manual_seed(seed)
    size = (shape.batch, shape.context, WIDTH)
    return torch.randn(size, dtype=torch.bfloat16, device=shape.device, generator=random)


def make_sets(shape: Shape, l2_bytes: int) -> list[Step]:
    """So many that each part's tensors, caches too, exceed L2 as often as `rotation` asks."""
    caches = [make_cache(shape, seed) for seed in range(rotation(shape.cache_bytes, l2_bytes))]
    sizes = (FRONT.bytes(shape.batch, shape.heads), BACK.bytes(shape.batch, shape.heads))
    most = max(len(caches), *(rotation(size, l2_bytes) for size in sizes))
    count = math.ceil(most / len(caches)) * len(caches)
    return [Step(shape, caches[seed % len(caches)], seed) for seed in range(count)]


def exact_attention(q: Tensor, cache: Tensor) -> Tensor:
    """In fp64, a sequence at a time."""
    results = []
    for one, latents in zip(q.double(), cache, strict=True):
        keys = latents.double()
        results.append(((one @ keys.T) * SCALE).softmax(-1) @ keys[:, :LATENT])
    return torch.stack(results)


class Case:
    """All parts at one shape; a row each, by the part's name or the backend's."""

    def __init__(self, shape: Shape, backends: Sequence[str]) -> None:
        self.shape = shape
        self.attentions: dict[str, Attend] = {}  # those that are right
        self.rows: dict[str, Part] = {}
        self._where = where = (shape.batch, shape.context, shape.heads)
        for part in OWN_PARTS:
            self.rows[part] = Part(*where, part, OWN, tolerance=OWN_TOLERANCE)
        for name in backends:
            title = BACKENDS[name][0]
            self.rows[name] = Part(*where, "attention", title, tolerance=ATTENTION_TOLERANCE)

    def attempt(self, name: str, error: Callable[[], float]) -> None:
        """Fills a row with its error, or with why there is none."""
        row = self.rows[name]
        try:
            row.relative_error = error()
        except NotInstalled as missing:
            row.status, row.reason = "not installed", str(missing)
        except WrongStep as wrong:
            row.status, row.reason = "wrong", str(wrong)
        except Exception as failure:  # whatever a library throws; the others still run
            row.status, row.reason = "failed", text_of(failure)
        else:
            if not row.relative_error < (row.tolerance or 0):  # true for NaN
                row.status, row.reason = "wrong", f"relative error {row.relative_error:.2e}, allowed {row.tolerance}"

    def check(self) -> None:
        step = Step(self.shape, make_cache(self.shape, 0), 0)

        def own(buffers: Buffers, call: Callable[[], object]) -> float:
            buffers.poison("out")
            call()
            return relative_error(buffers.decode("out"), buffers.exact())

        self.attempt("absorb_q", lambda: own(step.front, step.absorb))
        self.attempt("v_up", lambda: own(step.back, step.up))
        if self.rows["absorb_q"].status != "ok":
            return
        count = min(SAMPLED_SEQUENCES, self.shape.batch)
        sample = torch.linspace(0, self.shape.batch - 1, count, device=self.shape.device).long()
        want = exact_attention(step.front.out[sample], step.cache[sample])
        for name in [name for name in self.rows if name in BACKENDS]:
            self.attempt(name, partial(self._check_attention, name, step, sample, want))
            release()

    def _check_attention(self, name: str, step: Step, sample: Tensor, want: Tensor) -> float:
        """The error of attention. Raises WrongStep where v_up behind it is what is wrong."""
        attention = BACKENDS[name][1](self.shape)
        o_latent = step.attend(attention)
        error = relative_error(o_latent[sample], want)
        step.whole(attention)
        v = reference.v_up(o_latent[sample], step.back.w, step.back.w_scale)
        if not bool(o_latent.isfinite().all()):
            raise WrongStep("o_latent is not finite everywhere")
        if not (behind := relative_error(step.back.out[sample], v)) < OWN_TOLERANCE:
            raise WrongStep(f"v_up behind it: relative error {behind:.2e}, allowed {OWN_TOLERANCE}")
        self.attentions[name] = attention
        return error

    def time(self, replays: int) -> None:
        """Every part that is right; then the whole step with the fastest attention."""
        sets = make_sets(self.shape, l2_bytes())
        for step in sets:
            step.absorb()  # q, for an attention timed alone
        front, back = (side.bytes(self.shape.batch, self.shape.heads) for side in (FRONT, BACK))
        moved = {"absorb_q": front, "v_up": back, **dict.fromkeys(self.attentions, self.shape.bytes)}
        calls: dict[str, Sequence[Callable[[], object]]] = {
            "absorb_q": [step.absorb for step in sets],
            "v_up": [step.up for step in sets],
            **{name: [partial(step.attend, one) for step in sets] for name, one in self.attentions.items()},
        }
        self._measure({name: calls[name] for name in calls if self.rows[name].status == "ok"}, moved, replays)
        times = {name: row.us for name, row in self.rows.items() if row.us is not None and name in BACKENDS}
        if not times or any(self.rows[part].us is None for part in OWN_PARTS):
            return
        fastest = min(times, key=lambda name: times[name])
        self.rows["step"] = Part(*self._where, "step", BACKENDS[fastest][0])
        whole = [partial(step.whole, self.attentions[fastest]) for step in sets]
        self._measure({"step": whole}, {"step": front + self.shape.bytes + back}, replays)
        parts = [self.rows[name] for name in (*OWN_PARTS, fastest)]
        total = sum(row.us or 0 for row in parts)
        for row in parts:
            row.share = (row.us or 0) / total

    def _measure(
        self, calls: Mapping[str, Sequence[Callable[[], object]]], moved: Mapping[str, int], replays: int
    ) -> None:
        captured = capture_all(calls, lambda name: timing.launches_for(moved[name], len(calls[name])), self.rows)
        for name, samples in timing.interleave(captured, replays).items() if captured else ():
            self.rows[name].take(samples, moved[name])
