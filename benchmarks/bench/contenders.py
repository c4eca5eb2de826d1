"""Who runs: our ops, torch.bmm with what completes it, a fused Triton kernel, DeepGEMM, FlashInfer
and humming where installed.

A contender is a function of one buffer set that launches everything from the inputs to its result,
in a layout that Buffers.decode knows. `configs` are variants that are all checked, and of which the
fastest is timed.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mla_fp8.formats import MODES

from . import humming_calls
from .sides import BF16, Buffers, Side
from .triton_calls import (
    cast,
    concat,
    group_quant,
    has_triton,
    head_major,
    project,
    quantization_scratch,
    triton_configs,
)

OWN_TOLERANCE = 3e-3  # of ours from the reference: an accumulator and one rounding to bf16
# To e4m3, an accumulator that is off by d moves about d / ulp of the values by one ulp. The tensor
# core's fp8 sums have d = 1e-4, which gives 2.7e-3 (simulated); a kernel that rounds to bf16 first
# gets 1.15e-2.
OWN_FP8_TOLERANCE = 6e-3
BF16_TOLERANCE = 5e-3  # bf16 weights, bf16 output: 1.7e-3 each, and a margin
FP8_NOISE = 2.65e-2  # of one rounding of normal data to e4m3; roundings add in quadrature
FP8_MARGIN = 1.3
WEIGHT_LAYOUTS = ({"weights": "kn"}, {"weights": "nk"})  # a bf16 GEMM reads either; the faster one depends on the shape


@dataclass(frozen=True)
class Contender:
    name: str
    call: Callable[..., object]
    layout: str = "out"  # which of Buffers.result it writes
    fp8_roundings: int = 0  # activations, weights, output; each adds FP8_NOISE to the error from exact arithmetic
    ours: bool = False
    configs: tuple[dict[str, Any], ...] = ({},)
    activations: str = "exact"  # of ours

    @property
    def tolerance(self) -> float:
        """Of the error from exact arithmetic."""
        return BF16_TOLERANCE + FP8_MARGIN * FP8_NOISE * self.fp8_roundings**0.5


@dataclass(frozen=True)
class Missing:
    """A contender that cannot run here: it keeps its row in the tables."""

    name: str
    status: str = "not installed"
    reason: str = ""
    ours: bool = False


def own_tolerance(side: Side) -> float:
    """Of ours from the reference, which rounds as they do."""
    return OWN_FP8_TOLERANCE if side.out_bytes == 1 else OWN_TOLERANCE


def contenders(side: Side, s: int, activations: Sequence[str] = MODES) -> list[Contender | Missing]:
    """All of them, ours first."""
    triton: list[Contender | Missing] = list(fused_triton(side, s))
    if has_triton():
        triton = [Missing(one.name, "not installed", has_triton()) for one in triton]
    libraries = {"deep_gemm": deep_gemm, "flashinfer": flashinfer, "humming": humming}
    peers = [one for package, of in libraries.items() for one in available(package, of, side)]
    return [*ours(side, activations), *torch_bmm(side), *triton, *peers]


def ours(side: Side, activations: Sequence[str] = MODES) -> list[Contender]:
    """The library's ops, by positional calls of the .out overloads; after the op, its parts."""
    op, out_roundings = torch.ops.mla_fp8, int(side.out_bytes == 1)

    def bmm(b: Buffers) -> None:
        op.bmm.out(*b.quantized, b.w, b.w_scale, m=b.s, c_out=b.out_hs)

    def two_steps(b: Buffers) -> None:
        val, scale = quantization_scratch(b, head_major=True)
        op.quantize_q_nope.out(b.x, zero_pad=False, val_out=val, scale_out=scale)
        op.bmm.out(val, scale, b.w, b.w_scale, m=b.s, c_out=b.out.transpose(0, 1))

    if side.op == "bmm":
        return [Contender("mla_fp8 bmm", bmm, "out_hs", fp8_roundings=1, ours=True, activations="fp8")]
    found = []
    for mode in activations:
        name, roundings = f"mla_fp8 {side.op}" + ", fp8" * (mode == "fp8"), out_roundings + (mode == "fp8")
        found.append(Contender(name, own_product(side, mode), "out", roundings, ours=True, activations=mode))
    if side.name in ("front512", "back"):
        steps = "mla_fp8 quantize_q_nope + bmm"
        found.append(Contender(steps, two_steps, fp8_roundings=1, ours=True, activations="fp8"))
    return found


def own_product(side: Side, activations: str) -> Callable[[Buffers], None]:
    """A call of the side's op."""
    op, options = torch.ops.mla_fp8, {"fp8_activations": True} if activations == "fp8" else {}

    def absorb_q(b: Buffers) -> None:
        out_scale = b.static_scale if side.out_bytes == 1 else None
        op.absorb_q.out(b.x, b.w, b.w_scale, b.pe, out_scale, **options, q_out=b.out)

    def v_up(b: Buffers) -> None:
        op.v_up.out(b.x, b.w, b.w_scale, **options, v_out=b.out)

    def v_up_quantized(b: Buffers) -> None:
        val_out = b.out.flatten(1)
        op.v_up_quantized.out(b.x, b.w, b.w_scale, **options, val_out=val_out, scale_out=b.out_group_scale)

    return {"absorb_q": absorb_q, "v_up": v_up, "v_up_quantized": v_up_quantized}[side.op]


@dataclass(frozen=True)
class Product:
    """Somebody's GEMM with what turns its bf16 result into the side's output."""

    call: Callable[..., object]  # of a buffer set, the result [S,H,n] with any strides, and a configuration
    head_major: bool = True  # where an intermediate result is [H,S,n] in memory

    def alone(self, b: Buffers, **config: Any) -> None:
        self.call(b, b.out_hs.transpose(0, 1), **config)

    def into_output(self, b: Buffers, **config: Any) -> None:
        self.call(b, b.out[..., : b.side.n], **config)

    def into_view_and_copy(self, b: Buffers, **config: Any) -> None:
        assert b.pe is not None, f"{b.side.name} has no rope columns"
        self.into_output(b, **config)
        b.out[..., b.side.n :].copy_(b.pe)

    def _latent(self, b: Buffers, **config: Any) -> Tensor:
        scratch = b.scratch("latent", (b.heads, b.s, b.side.n))
        latent = scratch.transpose(0, 1) if self.head_major else scratch.view(b.s, b.heads, b.side.n)
        self.call(b, latent, **config)
        return latent

    def then_transpose(self, b: Buffers, **config: Any) -> None:
        b.out.copy_(self._latent(b, **config))

    def then_concat(self, b: Buffers, **config: Any) -> None:
        concat(b, self._latent(b, **config), b.out)

    def then_group_quant(self, b: Buffers, **config: Any) -> None:
        group_quant(b, self._latent(b, **config), b.out, b.out_group_scale.unsqueeze(-1), b.s)


def _bmm(b: Buffers, out: Tensor, weights: str) -> None:
    torch.bmm(b.x.transpose(0, 1), b.w_bf16_t if weights == "kn" else b.w_bf16.mT, out=out.transpose(0, 1))


TORCH = Product(_bmm)


def torch_bmm(side: Side) -> list[Contender]:
    def named(name: str, call: Callable[..., object], layout: str = "out", roundings: int = 0) -> Contender:
        return Contender(f"torch.bmm{name}", call, layout, roundings, configs=WEIGHT_LAYOUTS)

    alone, into_output = named("", TORCH.alone, "out_hs"), named(f" into [S,H,{side.n}]", TORCH.into_output)
    return {
        "front512": [alone, into_output],
        "front576": [
            named(" into view + q_pe copy", TORCH.into_view_and_copy),
            named(" + fused concat", TORCH.then_concat),
        ],
        "front576_fp8": [named(" + fused concat and quant", TORCH.then_concat, roundings=1)],
        "back": [alone, into_output, named(" + transpose copy", TORCH.then_transpose)],
        "back_fp8": [named(" + group quant", TORCH.then_group_quant, roundings=1)],
        "gemm": [],
    }[side.name]


def fused_triton(side: Side, s: int) -> list[Contender]:
    if side.name == "gemm":
        return []
    roundings = 1 if side.out_bytes == 2 else 2
    return [Contender("one fused Triton kernel", project, fp8_roundings=roundings, configs=triton_configs(side, s))]


@functools.cache
def load(name: str) -> ModuleType | str:
    """The module, or why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that is there but broken must not end the benchmark
        return f"{type(error).__name__}: {error}"


def available(
    package: str, contenders: Callable[[Any, Side], list[Contender]], side: Side
) -> list[Contender | Missing]:
    module = load(package)
    if isinstance(module, ModuleType):
        return list(contenders(module, side))
    status = "not installed" if module.startswith("ModuleNotFoundError") and f"'{package}'" in module else "failed"
    return [Missing(contender.name, status, module) for contender in contenders(None, side)]


def deep_gemm(library: Any, side: Side) -> list[Contender]:
    # Its expressions name the activations' dims b h r|d, the weights' h d r, whichever of d and r
    # is summed over.
    def einsum(b: Buffers, out: Tensor, weights: str) -> None:
        if weights == "nk":
            library.einsum("bhr,hdr->bhd", b.x, b.w_bf16, out)
        else:
            library.einsum("bhd,hdr->bhr", b.x, b.w_bf16_t, out)

    def fp8_einsum(b: Buffers) -> None:
        val, scale = quantization_scratch(b, head_major=False)
        group_quant(b, b.x, val, scale, b.s)
        library.fp8_einsum("bhr,hdr->bhd", (val, scale), (b.w, b.w_scale), b.out)

    def masked_product(b: Buffers, val: Tensor, scale: Tensor) -> None:
        w, tokens = b.masked_inputs
        # One name or the other, by the release.
        multiply = getattr(library, "m_grouped_fp8_gemm_nt_masked", None) or library.fp8_m_grouped_gemm_nt_masked
        multiply((val, scale), (w, b.w_scale), b.masked, tokens, b.s)

    def masked(b: Buffers) -> None:
        val, scale = quantization_scratch(b, head_major=True)
        group_quant(b, b.x, val.transpose(0, 1), scale.transpose(0, 1), b.m)
        masked_product(b, val, scale)

    def masked_alone(b: Buffers) -> None:
        masked_product(b, *b.quantized)

    def named(name: str, call: Callable[..., object], roundings: int = 0) -> Contender:
        return Contender(f"DeepGEMM einsum{name}", call, fp8_roundings=roundings, configs=WEIGHT_LAYOUTS)

    gemm = Product(einsum, head_major=False)
    products = [
        named("", gemm.into_output),
        Contender("quant + DeepGEMM fp8_einsum", fp8_einsum, fp8_roundings=1),
        Contender("quant + DeepGEMM masked GEMM", masked, layout="masked", fp8_roundings=1),
    ]
    return {
        "front512": products,
        "front576": [named(" into view + q_pe copy", gemm.into_view_and_copy)],
        "front576_fp8": [named(" + fused concat and quant", gemm.then_concat, 1)],
        "back": products,
        "back_fp8": [named(" + group quant", gemm.then_group_quant, 1)],
        "gemm": [Contender("DeepGEMM masked GEMM", masked_alone, layout="masked", fp8_roundings=1)],
    }[side.name]


def flashinfer(library: Any, side: Side) -> list[Contender]:
    """Per-tensor FP8: activations with a static scale, weights requantized to one scale."""

    def product(b: Buffers, out: Tensor) -> None:
        w, w_scale = b.w_tensor
        library.bmm_fp8(cast(b), w.mT, b.static_scale, w_scale, BF16, out.transpose(0, 1))

    def named(name: str, call: Callable[..., object], roundings: int, layout: str = "out") -> Contender:
        return Contender(f"cast + FlashInfer bmm_fp8{name}", call, layout, roundings)

    gemm = Product(product)
    return {
        "front512": [named("", gemm.alone, 2, "out_hs")],
        "front576": [named(" + fused concat", gemm.then_concat, 2)],
        "front576_fp8": [named(" + fused concat and quant", gemm.then_concat, 3)],
        "back": [named("", gemm.alone, 2, "out_hs")],
        "back_fp8": [named(" + group quant", gemm.then_group_quant, 3)],
        "gemm": [],
    }[side.name]


def humming(library: Any, side: Side) -> list[Contender]:
    """W8A16, the checkpoint's own blocks: a masked grouped GEMM, an expert a head.

    It reads and writes no views. So a copy makes [H,S,k] of the activations, except for one token of
    o_latent, and another the output of [H,S,n], except for one token without q_pe.
    """

    def product(b: Buffers, out: Tensor, **config: Any) -> None:
        humming_calls.multiply(b, head_major(b), out.transpose(0, 1), **config)

    gemm = Product(product)

    def into_output(b: Buffers, **config: Any) -> None:
        write = gemm.into_output if b.out.transpose(0, 1).is_contiguous() else gemm.then_concat
        write(b, **config)

    def named(name: str, call: Callable[..., object], layout: str = "out") -> Contender:
        return Contender(f"copy + humming W8A16{name}", call, layout, configs=humming_calls.CONFIGS)

    both = [named("", gemm.alone, "out_hs"), named(" + transpose copy", into_output)]
    return {"front512": both, "front576": [named(" + fused concat", gemm.then_concat)], "back": both}.get(side.name, [])
