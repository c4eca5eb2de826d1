"""DeepGEMM and FlashInfer, where they are installed."""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from buffers import BF16, Buffers
from contenders import WEIGHT_LAYOUTS, Contender, Missing, latent_scratch
from sides import Side
from triton_calls import cast, concat, group_quant, quantization_scratch


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
    # Its expressions name the activations' dims b h r|d, the weights' h d r, whichever of d and r is summed over.
    def einsum(b: Buffers, out: torch.Tensor, weights: str) -> None:
        if weights == "nk":
            library.einsum("bhr,hdr->bhd", b.x, b.w_bf16, out)
        else:
            library.einsum("bhd,hdr->bhr", b.x, b.w_bf16_t, out)

    def plain(b: Buffers, weights: str) -> None:
        einsum(b, b.out[..., : side.n], weights)

    def view_and_copy(b: Buffers, weights: str) -> None:
        plain(b, weights)
        b.out[..., side.n :].copy_(b.rope)

    def then_concat(b: Buffers, weights: str) -> None:
        latent = latent_scratch(b).view(b.s, b.heads, side.n)
        einsum(b, latent, weights)
        concat(b, latent, b.out)

    def then_group_quant(b: Buffers, weights: str) -> None:
        latent = latent_scratch(b).view(b.s, b.heads, side.n)
        einsum(b, latent, weights)
        group_quant(b, latent, b.out, b.out_group_scale.unsqueeze(-1), b.s)

    def fp8_einsum(b: Buffers) -> None:
        val, scale = quantization_scratch(b, head_major=False)
        group_quant(b, b.x, val, scale, b.s)
        library.fp8_einsum("bhr,hdr->bhd", (val, scale), (b.w, b.w_scale), b.out)

    def masked_product(b: Buffers, val: torch.Tensor, scale: torch.Tensor) -> None:
        # Of the weights it takes no view, so W_UV is a copy.
        library.m_grouped_fp8_gemm_nt_masked((val, scale), (b.w_packed, b.w_scale), b.masked, b.masked_m, b.s)

    def masked(b: Buffers) -> None:
        val, scale = quantization_scratch(b, head_major=True)
        group_quant(b, b.x, val.transpose(0, 1), scale.transpose(0, 1), b.m)
        masked_product(b, val, scale)

    def masked_alone(b: Buffers) -> None:
        masked_product(b, *b.quantized)

    if library is not None and not hasattr(library, "m_grouped_fp8_gemm_nt_masked"):
        library.m_grouped_fp8_gemm_nt_masked = library.fp8_m_grouped_gemm_nt_masked  # the name of another release
    products = [
        Contender("DeepGEMM einsum", plain, configs=WEIGHT_LAYOUTS),
        Contender("quant + DeepGEMM fp8_einsum", fp8_einsum, fp8_roundings=1),
        Contender("quant + DeepGEMM masked GEMM", masked, layout="masked", fp8_roundings=1),
    ]
    return {
        "front512": products,
        "front576": [Contender("DeepGEMM einsum into view + q_pe copy", view_and_copy, configs=WEIGHT_LAYOUTS)],
        "front576_fp8": [
            Contender("DeepGEMM einsum + fused concat and quant", then_concat, configs=WEIGHT_LAYOUTS, fp8_roundings=1)
        ],
        "back": products,
        "back_fp8": [
            Contender("DeepGEMM einsum + group quant", then_group_quant, configs=WEIGHT_LAYOUTS, fp8_roundings=1)
        ],
        "gemm": [Contender("DeepGEMM masked GEMM", masked_alone, layout="masked", fp8_roundings=1)],
    }[side.name]


def flashinfer(library: Any, side: Side) -> list[Contender]:
    """Per-tensor FP8: activations with a static scale, weights requantized to one scale."""

    def product(b: Buffers, out: torch.Tensor) -> None:
        w, w_scale = b.w_tensor
        library.bmm_fp8(cast(b), w.mT, b.x_scale, w_scale, BF16, out)

    def plain(b: Buffers) -> None:
        product(b, b.out_hs)

    def then_concat(b: Buffers) -> None:
        latent = latent_scratch(b)
        product(b, latent)
        concat(b, latent.transpose(0, 1), b.out)

    def then_group_quant(b: Buffers) -> None:
        latent = latent_scratch(b)
        product(b, latent)
        group_quant(b, latent.transpose(0, 1), b.out, b.out_group_scale.unsqueeze(-1), b.s)

    name = "cast + FlashInfer bmm_fp8"
    return {
        "front512": [Contender(name, plain, layout="out_hs", fp8_roundings=2)],
        "front576": [Contender(f"{name} + fused concat", then_concat, fp8_roundings=2)],
        "front576_fp8": [Contender(f"{name} + fused concat and quant", then_concat, fp8_roundings=3)],
        "back": [Contender(name, plain, layout="out_hs", fp8_roundings=2)],
        "back_fp8": [Contender(f"{name} + group quant", then_group_quant, fp8_roundings=3)],
        "gemm": [],
    }[side.name]


def peers(side: Side) -> list[Contender | Missing]:
    return available("deep_gemm", deep_gemm, side) + available("flashinfer", flashinfer, side)
