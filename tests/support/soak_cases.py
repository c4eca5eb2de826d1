"""What a soak repeats: a plan of cases that a seed draws, the tensors they work on, and a digest of each result."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from cases import ACTIVATIONS, CASE, OPS, OUT_LAYOUTS
from helpers import ROW_LAYOUTS, bits, strided
from torch import Tensor

import mla_fp8

HEADS, HEAD_DIM, LATENT = 128, 128, 512
ROPE_DIMS, OUT_SCALES, M_ALIGNMENTS = (16, 64, 64, 64, 256), (0.01, 1.0, 37.0), (1, 4, 64, 128, 256)
VERSIONS = 3  # of the weights
POOL_ELEMENTS = {"cpu": 2**22 + 3, "cuda": 2**25 + 3}  # odd, so that rows are others where a large case goes round
MAX_ROWS = {"cpu": 2**13, "cuda": 2**18}  # S * H; on a GPU 300 MB a result
THREADS = {"one thread": 1, "two threads": 2}
MODES = {"cpu": (*THREADS, "two at once"), "cuda": ("eager", "stream", "two streams", "graph")}
STREAMS = 3
SPECIAL_EVERY = 2**17  # elements of the pool, on average, between those that are NaN or infinite
DIGEST_WORDS = 2**20  # of 8 bytes, at once
DIGEST_FACTOR = 0x5851F42D4C957F2D  # odd, so that no chunk's difference is lost among the next ones
# (bits without the sign, the largest of them that is no NaN)
NAN_RULE = {
    torch.float8_e4m3fn: (0x7F, 0x7E),
    torch.bfloat16: (0x7FFF, 0x7F80),
    torch.float16: (0x7FFF, 0x7C00),
    torch.float32: (0x7FFFFFFF, 0x7F800000),
}


@dataclass(frozen=True)
class Case:
    """One call, made once a step: with the inputs at an offset of the pool, and a version of the weights."""

    number: int
    name: str  # of cases.CASE
    s: int
    heads: int
    first_head: int
    dtype: str
    layout: str
    rope: int
    out_scale: float
    m_alignment: int
    into: bool
    mode: str
    steps: tuple[tuple[int, int], ...]

    def __str__(self):
        heads = f"H={self.heads} from {self.first_head}"
        options = (
            f"rope {self.rope}" if self.rope else "",
            f"out_scale {self.out_scale}" if "fp8" in self.name else "",
        )
        told = [f"S={self.s}", heads, self.dtype, self.layout, *filter(None, options), *["into views"] * self.into]
        return f"case {self.number}: {self.name} {', '.join(told)}, {self.mode}"


def plan(seed: int, count: int, device: str) -> list[Case]:
    """The same cases for the same arguments, on any machine."""
    draw = random.Random(f"{seed} {count} {device}")
    cases = []
    for number in range(count):
        low, high = draw.choices([(0, 0), (1, 8), (9, 64), (65, 300), (301, 1000), (1001, 4096)], (2, 6, 5, 4, 2, 1))[0]
        s = draw.randint(low, high)
        heads = min(HEADS, draw.choice((1, 2, 3, 5, 8, 16, 32, 64, 127, 128)), max(1, MAX_ROWS[device] // max(s, 1)))
        name = draw.choice(list(CASE))
        rope = draw.choice(ROPE_DIMS) if "pe" in CASE[name].variant else 0
        steps = [(draw.randrange(POOL_ELEMENTS[device]), draw.randrange(VERSIONS)) for _ in range(draw.randint(1, 3))]
        modes = [mode for mode in MODES[device] if s or mode != "graph"]  # nothing is launched, nothing captured
        cases.append(
            Case(
                number,
                name,
                s,
                heads,
                draw.randint(0, HEADS - heads),
                draw.choice(("bfloat16", "float16")),
                draw.choice(list(ROW_LAYOUTS)),
                rope,
                draw.choice(OUT_SCALES),
                draw.choice(M_ALIGNMENTS),
                draw.random() < 0.5,
                draw.choice(modes),
                tuple(steps),
            )  # fmt: skip
        )
    return cases


class Material:
    """What outlives a case: a pool of values, the weights and their versions, what a digest multiplies by."""

    def __init__(self, seed: int, device: str):
        rng = torch.Generator().manual_seed(seed)
        count = POOL_ELEMENTS[device]
        values = torch.randn(count, generator=rng)
        special = torch.randint(count, (count // SPECIAL_EVERY,), generator=rng)
        values[special] = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(len(special))[: len(special)]
        self.pool = {dtype: values.to(device, dtype) for dtype in (torch.bfloat16, torch.float16)}
        self.sources = [self._weights(rng, device) for _ in range(VERSIONS)]
        self.weights, self.version = self._weights(rng, device), -1
        self.factors = torch.randint(-(2**62), 2**62, (DIGEST_WORDS,), generator=rng).to(device) * 2 + 1
        self.out_scales = {value: torch.tensor([value], device=device) for value in OUT_SCALES}
        self.device, self.launches, self.updates = self.factors.device, 0, 0
        self.streams = [torch.cuda.Stream() for _ in range(STREAMS)] if device == "cuda" else []
        self.threads = ThreadPoolExecutor(2)

    @staticmethod
    def _weights(rng, device) -> mla_fp8.AbsorbedWeights:
        """Of a checkpoint's tensor, of which w_uv stays a view."""
        shape = HEADS * 2 * HEAD_DIM, LATENT
        weight = (torch.randn(shape, generator=rng) * 80).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = (torch.rand(shape[0] // 128, shape[1] // 128, generator=rng) + 0.5) * 1e-3
        return mla_fp8.AbsorbedWeights.from_kv_b_proj(weight.to(device), scale.to(device), HEADS)

    def set_version(self, version: int) -> None:
        """In place and on the current stream, by update_ and by copy_ in turn; nothing where they have it already."""
        if version == self.version:
            return
        self.version, self.updates = version, self.updates + 1
        if self.updates % 2:
            self.weights.update_(self.sources[version])
        else:
            for tensor, source in zip(self.weights.buffers(), self.sources[version].buffers(), strict=True):
                tensor.copy_(source)

    def fill(self, x: Tensor, offset: int) -> None:
        """With the pool's values from an offset on, round and round."""
        pool, count = self.pool[x.dtype], x.numel()
        if offset + count > len(pool):
            pool, offset = pool.roll(-offset).repeat(-(-count // len(pool))), 0
        x.copy_(pool[offset : offset + count].view(x.shape))

    def digest(self, x: Tensor) -> Tensor:
        """An int64 on the device: of the bits in order, any NaN counting as one; one changed element always shows."""
        magnitude, largest = NAN_RULE[x.dtype]
        flat, per_word = bits(x.contiguous().view(-1)), 8 // x.element_size()
        total = torch.zeros((), dtype=torch.int64, device=x.device)
        for part in flat.split(DIGEST_WORDS * per_word):
            part = part.masked_fill((part & magnitude) > largest, magnitude)
            if len(part) % per_word:
                part = torch.nn.functional.pad(part, (0, -len(part) % per_word))
            words = part.view(torch.int64)
            total = total * DIGEST_FACTOR + (words * self.factors[: len(words)]).sum()
        return total


class Call:
    """The tensors of a case, which stay where they are: `fill` brings inputs and weights, `run` calls the op."""

    def __init__(self, case: Case, material: Material):
        self.case, self.material, self.one = case, material, CASE[case.name]
        weights, heads = material.weights, slice(case.first_head, case.first_head + case.heads)
        up = self.one.op.startswith("v_up")
        pair = (weights.w_uv, weights.w_uv_scale) if up else (weights.w_uk, weights.w_uk_scale)
        weight, scale = (tensor[heads] for tensor in pair)
        width = weight.shape[-1]
        shape, dtype = (case.s, case.heads, width + case.rope), getattr(torch, case.dtype)
        self.x, _ = strided(shape, *ROW_LAYOUTS[case.layout](*shape), dtype, material.device)
        rows, self.quantized = self.x[..., :width], ()
        if self.one.op == "quantize_q_nope":
            self.arguments = {"q_nope": rows, "m_alignment": case.m_alignment}
        elif self.one.op == "bmm":
            self.quantized = OPS.quantize_q_nope(rows, m_alignment=case.m_alignment)
            names = ("a", "a_scale", "b", "b_scale")
            self.arguments = dict(zip(names, (*self.quantized, weight, scale), strict=True))
            self.arguments |= {"m": case.s} if self.one.variant else {}
        else:
            names = ("o_latent", "w_uv", "w_uv_scale") if up else ("q_nope", "w_uk", "w_uk_scale")
            self.arguments = dict(zip(names, (rows, weight, scale), strict=True))
            self.arguments |= {"q_pe": self.x[..., width:]} if case.rope else {}
            self.arguments |= {"out_scale": material.out_scales[case.out_scale]} if "fp8" in self.one.variant else {}
            self.arguments |= ACTIVATIONS["fp8" if "one_term" in self.one.variant else "exact"]
        on_meta = {name: x.to("meta") if torch.is_tensor(x) else x for name, x in self.arguments.items()}
        self.shapes = [(result.shape, result.dtype) for result in self.one.call(on_meta)]

    def fill(self, step: int) -> None:
        offset, version = self.case.steps[step]
        update_last = self.case.number % 2  # the call then follows its weights at once
        if not update_last:
            self.material.set_version(version)
        self.material.fill(self.x, offset)
        if self.quantized:
            val, scale = self.quantized
            rows = self.x[..., : val.shape[-1]]
            OPS.quantize_q_nope.out(rows, m_alignment=self.case.m_alignment, val_out=val, scale_out=scale)
            self.material.launches += 1
        if update_last:
            self.material.set_version(version)

    def run(self) -> tuple[Tensor, ...]:
        if not self.case.into:
            return self.one.call(self.arguments)
        views = {}
        for (name, layout), (shape, dtype) in zip(self.one.outs.items(), self.shapes, strict=True):
            views[name], _ = strided(shape, *OUT_LAYOUTS[layout](shape), dtype, self.material.device)
        self.one.out(**self.arguments, **views)
        return tuple(views.values())

    def results(self) -> Iterator[list[tuple[Tensor, ...]]]:
        """Each step's, made in the case's mode: of one call, or of two at once."""
        if self.case.mode == "graph":
            yield from self._replays()
            return
        for step in range(len(self.case.steps)):
            self.fill(step)
            yield self._made()

    def _made(self) -> list[tuple[Tensor, ...]]:
        mode, streams = self.case.mode, self.material.streams
        if mode == "two at once":
            return list(self.material.threads.map(lambda _: self.run(), range(2)))
        if mode in THREADS:
            threads = torch.get_num_threads()
            torch.set_num_threads(THREADS[mode])
            results = [self.run()]
            torch.set_num_threads(threads)
            return results
        if mode in ("stream", "two streams"):
            first = self.case.number % len(streams)
            return self._on([streams[first]] if mode == "stream" else streams[:2])
        return [self.run()]

    def _on(self, streams: list) -> list[tuple[Tensor, ...]]:
        here, results = torch.cuda.current_stream(), []
        for stream in streams:
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                results.append(self.run())
        for stream in streams:
            here.wait_stream(stream)
        return results

    def _replays(self) -> Iterator[list[tuple[Tensor, ...]]]:
        """Captured once; later steps bring other inputs and weights to the same addresses."""
        self.fill(0)
        self.graph = torch.cuda.CUDAGraph()  # lives as long as this call, which the caller keeps until the GPU is done
        with torch.cuda.graph(self.graph):
            captured = self.run()
        for step in range(len(self.case.steps)):
            self.fill(step)
            self.graph.replay()
            yield [tuple(result.clone() for result in captured)]
