"""Each op in plain PyTorch: the specification that the kernels are tested against.

Quantization is bit-exact: CPU, CUDA and these lines agree in every bit (any NaN equals any NaN).
Products are exact up to float64, then rounded, so kernels agree within the rounding of an fp32 accumulator; with
`product=tensor_core_product` they are summed as the CUDA kernels sum on Hopper, and agree in every bit.

A product takes activations x with their scale, quantized, or 16-bit x and None in its place: x exact.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from mla_fp8.formats import AMAX_FLOOR, E4M3, EXACT_TERMS, FP8_MAX, GROUP, dequantize_blocks, to_fp8

__all__ = [
    "absorb_q",
    "bmm",
    "dequantize_blocks",
    "exact_product",
    "keep_or_quantize",
    "quantize",
    "quantize_q_nope",
    "split",
    "tensor_core_product",
    "to_fp8",
    "v_up",
    "v_up_quantized",
]

WGMMA_K = 32  # products that Hopper's tensor cores add at a time
FRACTION_BITS = 13  # of what they add, and of the sum
LEAST_EXPONENT = -6  # of an e4m3, its subnormal numbers included
MOST_ADDENDS = 2**23  # at a time, in fp64, unless a token has more

E4M3_FRACTION_BITS = 3
# Of a number of 7 or 10 fraction bits whose least exponent is an e4m3's.
LEAST_MULTIPLE = {torch.bfloat16: 2.0 ** (LEAST_EXPONENT - 7), torch.float16: 2.0 ** (LEAST_EXPONENT - 10)}
BELOW_1_75 = 0x1FFFFF  # added to the bits of an fp32, it carries into the exponent from 1.75 * 2^e exclusive on
FP8_MAX_EXPONENT = 8  # 448 = 1.75 * 2^8

Product: TypeAlias = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


def quantize(x: Tensor, amax_floor: float = AMAX_FLOOR) -> tuple[Tensor, Tensor]:
    """[..., K] -> e4m3 [..., K] and fp32 [..., K/128], such that x ≈ val * scale. Tensor division: IEEE on CUDA too."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    floor = torch.tensor(amax_floor, dtype=torch.float32, device=x.device)
    scale = torch.maximum(groups.abs().amax(-1), floor) / torch.full_like(floor, FP8_MAX)
    return to_fp8(groups, scale.unsqueeze(-1)).flatten(-2), scale


def split(x: Tensor, terms: int | None = None) -> tuple[Tensor, Tensor]:
    """16-bit [..., K] -> e4m3 [terms, ..., K], greatest first, and fp32 [..., K/128]: x ≈ the terms' sum * scale.

    The scale is the least power of two with amax <= 448 * scale, at least 2^-126; NaN for a group with NaN or Inf. Each
    term is what those before it left, cut towards zero to an e4m3. First, what lies below an e4m3's normal numbers is
    rounded to the multiples that x's own format has in the scale in which e4m3 is its 8 leading bits.
    """
    groups = x.float().unflatten(-1, (-1, GROUP))
    amax = groups.abs().amax(-1)
    biased_exponent = (amax.view(torch.int32) + BELOW_1_75 >> 23) - FP8_MAX_EXPONENT
    scale = (biased_exponent.clamp(min=1) << 23).view(torch.float32).masked_fill(~amax.isfinite(), torch.nan)
    rest = groups.double() / scale.double().unsqueeze(-1)
    least = LEAST_MULTIPLE[x.dtype]
    rest = torch.where(rest.abs() < 2.0**LEAST_EXPONENT, (rest / least).round() * least, rest)
    parts = []
    for _ in range(terms or EXACT_TERMS[x.dtype]):
        part = _cut(rest, _exponent(rest).clamp(min=LEAST_EXPONENT), E4M3_FRACTION_BITS)
        rest = rest - part
        parts.append(part.to(E4M3).flatten(-2))
    return torch.stack(parts), scale


def keep_or_quantize(x: Tensor, activations: str) -> tuple[Tensor, Tensor | None]:
    """What a product takes of 16-bit x: for "exact" x itself and None, for "fp8" its quantization."""
    return {"exact": lambda: (x, None), "fp8": lambda: quantize(x)}[activations]()


def exact_product(x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor) -> Tensor:
    """[S,H,K] and [S,H,K/128] x ([H,N,K] and [H,N/128,K/128])ᵀ -> fp64 [S,H,N], as exact as fp64 is.

    Without x_scale, a row of x with a NaN or Inf is NaN as a whole.
    """
    exact = x.double()
    if x_scale is None:
        exact = exact.masked_fill(~exact.isfinite().all(-1, keepdim=True), torch.nan)
    else:
        exact = exact * x_scale.double().repeat_interleave(GROUP, -1)
    return torch.einsum("shk,hnk->shn", exact, dequantize_blocks(w, w_scale))


def tensor_core_product(x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor) -> Tensor:
    """The same -> fp32 [S,H,N], with the bits of the CUDA kernels on Hopper; on any device, slowly."""
    terms, scale = split(x) if x_scale is None else (x.unsqueeze(0), x_scale)
    rows = max(1, MOST_ADDENDS // (w.numel() // GROUP * (WGMMA_K + 1)))
    parts = zip(terms.split(rows, 1), scale.split(rows), strict=True)
    return torch.cat([_tensor_core_rows(some, their_scale, w, w_scale) for some, their_scale in parts])


def _tensor_core_rows(terms: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """All of K by the least term first, then by the next, in one sum a group."""
    s, h, groups = scale.shape
    partial = torch.zeros(h, groups, s, w.shape[1], dtype=torch.float64, device=w.device)
    for term in reversed(terms.transpose(1, 2).unbind()):
        for a, b in zip(_steps(term), _steps(w), strict=True):
            partial = _add_products(partial, a, b)
    sums = torch.zeros(s, h, w.shape[1], device=w.device)
    for group, addend in enumerate(partial.permute(1, 2, 0, 3)):
        scales = scale[:, :, None, group] * w_scale[..., group].repeat_interleave(GROUP, -1)
        sums = _add_rounding_once(addend * scales.double(), sums.double())
    return sums


def _steps(x: Tensor) -> tuple[Tensor, ...]:
    """e4m3 [H, S or N, K] -> fp64 [H,K/128,S or N,32], what wgmma takes at a time."""
    return x.double().unflatten(-1, (-1, GROUP)).transpose(1, 2).split(WGMMA_K, -1)


def _add_rounding_once(x: Tensor, y: Tensor) -> Tensor:
    """fp64 + fp64 -> fp32, as a fused multiply-add gives it: by a sum that is rounded to odd."""
    total = x + y
    seen = total - x
    dropped = (x - (total - seen)) + (y - seen)  # exact: Knuth's two-sum
    even = total.view(torch.int64) & 1 == 0
    beyond = torch.nextafter(total, dropped.sign() * torch.inf)
    return torch.where((dropped.abs() > 0) & even, beyond, total).float()


def _add_products(sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[...,S,N] + [...,S,32] x [...,N,32]ᵀ in fp64, as one wgmma does it.

    All 33 addends are cut, towards zero, to 13 fraction bits of the largest exponent among them, that of a product
    being the sum of its factors', a subnormal's -6. Their exact sum is cut to 13 fraction bits of its own.
    """
    addends = torch.cat([a.unsqueeze(-2) * b.unsqueeze(-3), sums.unsqueeze(-1)], -1)
    of_a, of_b = (torch.where(x == 0, _exponent(x), _exponent(x).clamp(min=LEAST_EXPONENT)) for x in (a, b))
    of_products = of_a.unsqueeze(-2) + of_b.unsqueeze(-3)
    exponents = torch.cat([of_products, _exponent(sums).unsqueeze(-1)], -1)
    total = _cut(addends, exponents.amax(-1, keepdim=True)).sum(-1)
    return _cut(total, _exponent(total))


def _exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|) of normal fp64; of zero -1023, less than of any sum here."""
    return (x.view(torch.int64) >> 52 & 0x7FF) - 0x3FF


def _cut(x: Tensor, exponent: Tensor, fraction_bits: int = FRACTION_BITS) -> Tensor:
    """To multiples of 2^(exponent - fraction_bits), towards zero."""
    biased = (exponent - fraction_bits + 0x3FF).clamp(min=1)  # where all addends are zero, any quantum will do
    quantum = (biased << 52).view(torch.float64)
    return (x / quantum).trunc() * quantum


def quantize_q_nope(q_nope: Tensor, m_alignment: int = 256, amax_floor: float = AMAX_FLOOR) -> tuple[Tensor, Tensor]:
    """[S,H,K] -> q_val [H,M,K] and q_scale [H,M,K/128], M = ceil(S / m_alignment) * m_alignment; rows >= S are zero."""
    s, h, k = q_nope.shape
    m = -(-s // m_alignment) * m_alignment
    val, scale = quantize(q_nope, amax_floor)
    q_val = torch.zeros(h, m, k, dtype=E4M3, device=q_nope.device)
    q_scale = q_nope.new_zeros(h, k // GROUP, -(-m // 4) * 4, dtype=torch.float32).transpose(1, 2)[:, :m]
    q_val[:, :s].view(torch.uint8).copy_(val.view(torch.uint8).transpose(0, 1))
    q_scale[:, :s].copy_(scale.transpose(0, 1))
    return q_val, q_scale


def bmm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, m: int | None = None, *, product: Product = exact_product
) -> Tensor:
    """[B,M,K] x [B,N,K]ᵀ -> bf16 [B,m,N]; a_scale [B,M,K/128], b_scale [B,N/128,K/128]."""
    m = a.shape[1] if m is None else m
    c = product(a[:, :m].transpose(0, 1), a_scale[:, :m].transpose(0, 1), b, b_scale).transpose(0, 1)
    return c.to(torch.bfloat16, memory_format=torch.contiguous_format)


def absorb_q(
    q_nope: Tensor,
    w_uk: Tensor,
    w_uk_scale: Tensor,
    q_pe: Tensor | None = None,
    out_scale: Tensor | None = None,
    *,
    activations: str = "exact",
    product: Product = exact_product,
) -> Tensor:
    """[S,H,D] x [H,R,D]ᵀ -> [S,H,R], or [S,H,R+P] with q_pe [S,H,P]; e4m3 with out_scale, else q_nope's dtype."""
    q = product(*keep_or_quantize(q_nope, activations), w_uk, w_uk_scale)
    if q_pe is not None:
        q = torch.cat([q, q_pe.to(q.dtype)], dim=-1)
    return q.to(q_nope.dtype) if out_scale is None else to_fp8(q, out_scale)


def v_up(
    o_latent: Tensor,
    w_uv: Tensor,
    w_uv_scale: Tensor,
    out_scale: Tensor | None = None,
    *,
    activations: str = "exact",
    product: Product = exact_product,
) -> Tensor:
    """[S,H,R] x [H,V,R]ᵀ -> [S,H,V]; e4m3 with out_scale, else o_latent's dtype."""
    return absorb_q(o_latent, w_uv, w_uv_scale, out_scale=out_scale, activations=activations, product=product)


def v_up_quantized(
    o_latent: Tensor,
    w_uv: Tensor,
    w_uv_scale: Tensor,
    *,
    activations: str = "exact",
    product: Product = exact_product,
) -> tuple[Tensor, Tensor]:
    """[S,H,R] x [H,128,R]ᵀ -> e4m3 [S,H*128] and fp32 [S,H] with strides (1, ceil4(S))."""
    s, h, _ = o_latent.shape
    val, scale = quantize(product(*keep_or_quantize(o_latent, activations), w_uv, w_uv_scale))
    v_scale = o_latent.new_empty(h, -(-s // 4) * 4, dtype=torch.float32).mT[:s]
    return val.flatten(1), v_scale.copy_(scale.squeeze(-1))
