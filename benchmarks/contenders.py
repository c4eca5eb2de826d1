"""Who runs: our ops, torch.bmm with what completes it, a fused Triton kernel. Other libraries are in peers.py.

A contender is a function of one buffer set that launches everything from the inputs to its result, in a layout that
Buffers.decode knows. `configs` are variants that are all checked, and of which the fastest is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from buffers import Buffers
from sides import Side
from torch import Tensor
from triton_calls import concat, group_quant, project, quantization_scratch

OWN_TOLERANCE = 3e-3  # against the quantized reference: an accumulator and one rounding to bf16
# To e4m3, an accumulator that is off by d moves about d / ulp of the values by one ulp. The tensor core's fp8 sums have
# d = 1e-4, which gives 2.7e-3 (simulated); a kernel that rounds to bf16 first gets 1.15e-2.
OWN_FP8_TOLERANCE = 6e-3
BF16_TOLERANCE = 5e-3  # bf16 weights, bf16 output: 1.7e-3 each, and a margin
FP8_NOISE = 2.65e-2  # of one rounding of normal data to e4m3; roundings add in quadrature
FP8_MARGIN = 1.3


@dataclass(frozen=True)
class Contender:
    name: str
    call: Callable[..., object]
    layout: str = "out"  # which of Buffers.result it writes
    fp8_roundings: int = 0  # beyond the reference's: activations, weights, output; each adds FP8_NOISE to the error
    ours: bool = False
    configs: tuple[dict[str, Any], ...] = ({},)

    @property
    def tolerance(self) -> float:
        if self.ours:
            return OWN_FP8_TOLERANCE if self.fp8_roundings else OWN_TOLERANCE
        return BF16_TOLERANCE + FP8_MARGIN * FP8_NOISE * self.fp8_roundings**0.5


@dataclass(frozen=True)
class Missing:
    """A contender that cannot run here: it keeps its row in the tables."""

    name: str
    status: str = "not installed"
    reason: str = ""
    ours: bool = field(default=False)


def ours(side: Side) -> list[Contender]:
    """The library's ops, written to given outputs by positional calls of the .out overloads."""
    op = torch.ops.mla_fp8

    def absorb_q(b: Buffers) -> None:
        out_scale = b.out_scale if side.out_bytes == 1 else None
        op.absorb_q.out(b.x, b.w, b.w_scale, b.pe, out_scale, q_out=b.out)

    def v_up(b: Buffers) -> None:
        op.v_up.out(b.x, b.w, b.w_scale, v_out=b.out)

    def v_up_quantized(b: Buffers) -> None:
        op.v_up_quantized.out(b.x, b.w, b.w_scale, val_out=b.out.flatten(1), scale_out=b.out_group_scale)

    def bmm(b: Buffers) -> None:
        op.bmm.out(*b.quantized, b.w, b.w_scale, m=b.s, c_out=b.out_hs)

    def three_steps(b: Buffers) -> None:
        val, scale = quantization_scratch(b, head_major=True)
        op.quantize_q_nope.out(b.x, zero_pad=False, val_out=val, scale_out=scale)
        op.bmm.out(val, scale, b.w, b.w_scale, m=b.s, c_out=b.out.transpose(0, 1))

    steps = Contender("mla_fp8 quantize_q_nope + bmm", three_steps, ours=True)
    return {
        "front512": [Contender("mla_fp8 absorb_q", absorb_q, ours=True), steps],
        "front576": [Contender("mla_fp8 absorb_q", absorb_q, ours=True)],
        "front576_fp8": [Contender("mla_fp8 absorb_q", absorb_q, fp8_roundings=1, ours=True)],
        "back": [Contender("mla_fp8 v_up", v_up, ours=True), steps],
        "back_fp8": [Contender("mla_fp8 v_up_quantized", v_up_quantized, fp8_roundings=1, ours=True)],
        "gemm": [Contender("mla_fp8 bmm", bmm, layout="out_hs", ours=True)],
    }[side.name]


WEIGHT_LAYOUTS = ({"weights": "kn"}, {"weights": "nk"})  # torch.bmm reads either; which is faster depends on the shape


def bmm(b: Buffers, out: Tensor, weights: str) -> None:
    """The bf16 product, to [H,S,n] with any strides."""
    torch.bmm(b.x.transpose(0, 1), b.w_bf16_t if weights == "kn" else b.w_bf16.mT, out=out)


def latent_scratch(b: Buffers) -> Tensor:
    return b.scratch("latent", (b.heads, b.s, b.side.n))


def torch_bmm(side: Side) -> list[Contender]:
    def plain(b: Buffers, weights: str) -> None:
        bmm(b, b.out_hs, weights)

    def into_view(b: Buffers, weights: str) -> None:
        bmm(b, b.out[..., : side.n].transpose(0, 1), weights)

    def view_and_copy(b: Buffers, weights: str) -> None:
        into_view(b, weights)
        b.out[..., side.n :].copy_(b.rope)

    def then_transpose(b: Buffers, weights: str) -> None:
        latent = latent_scratch(b)
        bmm(b, latent, weights)
        b.out.copy_(latent.transpose(0, 1))

    def then_concat(b: Buffers, weights: str) -> None:
        latent = latent_scratch(b)
        bmm(b, latent, weights)
        concat(b, latent.transpose(0, 1), b.out)

    def then_group_quant(b: Buffers, weights: str) -> None:
        latent = latent_scratch(b)
        bmm(b, latent, weights)
        group_quant(b, latent.transpose(0, 1), b.out, b.out_group_scale.unsqueeze(-1), b.s)

    def named(name: str, call: Callable[..., object], **options: Any) -> Contender:
        return Contender(name, call, configs=WEIGHT_LAYOUTS, **options)

    return {
        "front512": [named("torch.bmm", plain, layout="out_hs"), named("torch.bmm into [S,H,512]", into_view)],
        "front576": [
            named("torch.bmm into view + q_pe copy", view_and_copy),
            named("torch.bmm + fused concat", then_concat),
        ],
        "front576_fp8": [named("torch.bmm + fused concat and quant", then_concat, fp8_roundings=1)],
        "back": [
            named("torch.bmm", plain, layout="out_hs"),
            named("torch.bmm into [S,H,128]", into_view),
            named("torch.bmm + transpose copy", then_transpose),
        ],
        "back_fp8": [named("torch.bmm + group quant", then_group_quant, fp8_roundings=1)],
        "gemm": [],
    }[side.name]


def fused_triton(side: Side) -> list[Contender]:
    """Its configurations depend on S: see triton_configs."""
    if side.name == "gemm":
        return []
    roundings = 1 if side.out_bytes == 2 else 2
    return [Contender("one fused Triton kernel", project, fp8_roundings=roundings)]
