"""Each op in plain PyTorch: the specification that the kernels are tested against.

Quantization is bit-exact: CPU, CUDA and these lines agree in every bit (any NaN equals any NaN).
Products are exact up to float64 and rounded once, so kernels agree within the rounding of an fp32 accumulator.
"""

import torch
from torch import Tensor

__all__ = ["absorb_q", "bmm", "dequantize_blocks", "quantize", "quantize_q_nope", "to_fp8", "v_up", "v_up_quantized"]

GROUP = 128  # activations share a scale by 1x128, weights by 128x128
FP8_MAX = 448.0  # largest finite float8_e4m3fn
AMAX_FLOOR = 1e-4  # DeepGEMM's per_token_cast_to_fp8


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Round `x / scale` to e4m3, as a product with the reciprocal; NaN stays NaN, what is too large becomes ±448."""
    return (x.float() * (torch.ones_like(scale) / scale)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def quantize(x: Tensor, amax_floor: float = AMAX_FLOOR) -> tuple[Tensor, Tensor]:
    """[..., K] -> e4m3 [..., K] and fp32 [..., K/128], such that x ≈ val * scale. Tensor division: IEEE on CUDA too."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    floor = torch.tensor(amax_floor, dtype=torch.float32, device=x.device)
    scale = torch.maximum(groups.abs().amax(-1), floor) / torch.full_like(floor, FP8_MAX)
    return to_fp8(groups, scale.unsqueeze(-1)).flatten(-2), scale


def dequantize_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """e4m3 [..., N, K] and fp32 [..., N/128, K/128] -> fp64 [..., N, K]."""
    return weight.double() * scale.double().repeat_interleave(GROUP, -2).repeat_interleave(GROUP, -1)


def quantize_q_nope(q_nope: Tensor, m_alignment: int = 256, amax_floor: float = AMAX_FLOOR) -> tuple[Tensor, Tensor]:
    """[S,H,K] -> q_val [H,M,K] and q_scale [H,M,K/128], M = ceil(S / m_alignment) * m_alignment; rows >= S are zero."""
    s, h, k = q_nope.shape
    m = -(-s // m_alignment) * m_alignment
    val, scale = quantize(q_nope, amax_floor)
    q_val = torch.zeros(h, m, k, dtype=torch.float8_e4m3fn, device=q_nope.device)
    q_scale = q_nope.new_zeros(h, k // GROUP, -(-m // 4) * 4, dtype=torch.float32).transpose(1, 2)[:, :m]
    q_val[:, :s].view(torch.uint8).copy_(val.view(torch.uint8).transpose(0, 1))
    q_scale[:, :s].copy_(scale.transpose(0, 1))
    return q_val, q_scale


def bmm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, m: int | None = None) -> Tensor:
    """[B,M,K] x [B,N,K]ᵀ -> bf16 [B,m,N]; a_scale [B,M,K/128], b_scale [B,N/128,K/128]."""
    m = a.shape[1] if m is None else m
    a_exact = a[:, :m].double() * a_scale[:, :m].double().repeat_interleave(GROUP, -1)
    return (a_exact @ dequantize_blocks(b, b_scale).mT).bfloat16()


def absorb_q(
    q_nope: Tensor, w_uk: Tensor, w_uk_scale: Tensor, q_pe: Tensor | None = None, out_scale: Tensor | None = None
) -> Tensor:
    """[S,H,D] x [H,R,D]ᵀ -> [S,H,R], or [S,H,R+P] with q_pe [S,H,P]; e4m3 with out_scale, else q_nope's dtype."""
    val, scale = quantize(q_nope)
    exact = val.double() * scale.double().repeat_interleave(GROUP, -1)
    q = torch.einsum("shd,hrd->shr", exact, dequantize_blocks(w_uk, w_uk_scale))
    if q_pe is not None:
        q = torch.cat([q, q_pe.double()], dim=-1)
    return q.to(q_nope.dtype) if out_scale is None else to_fp8(q, out_scale)


def v_up(o_latent: Tensor, w_uv: Tensor, w_uv_scale: Tensor, out_scale: Tensor | None = None) -> Tensor:
    """[S,H,R] x [H,V,R]ᵀ -> [S,H,V]; e4m3 with out_scale, else o_latent's dtype."""
    return absorb_q(o_latent, w_uv, w_uv_scale, out_scale=out_scale)


def v_up_quantized(o_latent: Tensor, w_uv: Tensor, w_uv_scale: Tensor) -> tuple[Tensor, Tensor]:
    """[S,H,R] x [H,128,R]ᵀ -> e4m3 [S,H*128] and fp32 [S,H] with strides (1, ceil4(S))."""
    s, h, _ = o_latent.shape
    v = absorb_q(o_latent.float(), w_uv, w_uv_scale)
    val, scale = quantize(v)
    v_scale = o_latent.new_empty(h, -(-s // 4) * 4, dtype=torch.float32).mT[:s]
    return val.flatten(1), v_scale.copy_(scale.squeeze(-1))
