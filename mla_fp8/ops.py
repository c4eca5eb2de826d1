"""The ops: a docstring each and one call to torch.ops.mla_fp8.

S tokens, H heads, D = qk_nope_head_dim (128), R = kv_lora_rank (512), P = qk_rope_head_dim (64), V = v_head_dim (128).
A scale dequantizes: x ≈ x_val * x_scale. Activations are bf16 or fp16 with a contiguous last dim and any other strides,
so views of q[S, H, 192] need no copy. Weights are float8_e4m3fn with a contiguous last dim and other strides that are
multiples of 16. All run on CPU and on CUDA (the GPUs in README.md), on the current stream, deterministically; the bits
of a (token, head) do not depend on the others in the batch. None has a backward. Given `out` tensors are written in
place, never resized, and must not overlap an input.

With activations="exact", a product takes x as it is: on a GPU as a power of two times a sum of e4m3 terms, two for bf16
and three for fp16, which is x from 1/900 (fp16: 1/112) of its 1x128 group's largest up, and within 2^-16 of the largest
below. With "fp8", x is rounded to one e4m3 term times a scale, which costs 2.6e-2 of error. See docs/numerics.md.

Sources: DeepSeek-V2 paper (arXiv:2405.04434) section 2.1 and appendix C for MLA; DeepSeek-V3 paper (arXiv:2412.19437)
section 3.3 for 1x128 and 128x128 scales.
"""

import torch
from torch import Tensor

from mla_fp8.arguments import mode, names_types

_ops = torch.ops.mla_fp8


@names_types
def quantize_q_nope(
    q_nope: Tensor,
    *,
    m_alignment: int = 256,
    amax_floor: float = 1e-4,
    zero_pad: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize to FP8 in 1x128 groups, transpose to head-major and pad the rows: step one of the published three.

    q_scale = max(amax(|q_nope|), amax_floor) / 448; q_val = e4m3(clamp(q_nope * (1 / q_scale), ±448)), to nearest even.

    Args:
        q_nope: [S, H, K] bf16 or fp16, K a multiple of 128 up to 16,384; the last dim contiguous.
        m_alignment: rows are padded to M = ceil(S / m_alignment) * m_alignment; at least 1.
        amax_floor: least amax of a group, finite and at least 1e-30, so that a zero row has a scale.
        zero_pad: write zeros to rows S..M-1 of q_val and q_scale; else they are left unwritten.
        out: q_val and q_scale to write to, of the shapes below; q_scale with any strides.

    Returns:
        q_val: [H, M, K] float8_e4m3fn, contiguous.
        q_scale: [H, M, K/128] fp32 with strides (ceil4(M) * K/128, 1, ceil4(M)), as DeepGEMM's masked GEMM reads it.

    Raises:
        RuntimeError: q_nope's rank, dtype, K or last stride; m_alignment; amax_floor; a tensor that requires grad;
            dtype, shape, device or overlap of `out`.

    Notes: a NaN or Inf poisons its own group only. Safe in CUDA graphs.

    Source: `per_token_cast_to_fp8` of DeepGEMM, whose values it gives.

    Example:
        >>> q_val, q_scale = quantize_q_nope(torch.randn(3, 2, 128, dtype=torch.bfloat16))
        >>> q_val.shape, q_scale.shape
        (torch.Size([2, 256, 128]), torch.Size([2, 256, 1]))
    """
    options = {"m_alignment": m_alignment, "amax_floor": amax_floor, "zero_pad": zero_pad}
    if out is None:
        return _ops.quantize_q_nope.default(q_nope, **options)
    _ops.quantize_q_nope.out(q_nope, **options, val_out=out[0], scale_out=out[1])
    return out


@names_types
def bmm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, m: int | None = None, out: Tensor | None = None
) -> Tensor:
    """Multiply FP8 batches by FP8 weights, c = a · bᵀ with block scales: the GEMM of the published three steps.

    c[i,j,n] = sum over blocks p of K, ascending, of (a[i,j,p] · b[i,n,p]) * (a_scale[i,j,p] * b_scale[i,n/128,p]).

    Args:
        a: [B, M, K] float8_e4m3fn, K a multiple of 128 up to 16,384; strides as for weights.
        a_scale: [B, M, K/128] fp32, any strides.
        b: [B, N, K] float8_e4m3fn, N a multiple of 128 up to 16,384.
        b_scale: [B, N/128, K/128] fp32, any strides.
        m: rows to compute, 0 <= m <= M, all where None; rows of `a` from m on are not read.
        out: [B, m, N] bf16 to write to.

    Returns:
        [B, m, N] bf16, contiguous; accumulated in fp32, rounded once.

    Raises:
        RuntimeError: rank, dtype, extents or strides of an argument; m; tensors on several devices; one that requires
            grad; dtype, shape, device or overlap of `out`.

    Notes: for K = 128 the bits equal absorb_q's with "fp8". Safe in CUDA graphs.

    Source: DeepSeek-V3 paper, section 3.3.

    Example:
        >>> a, a_scale = quantize_q_nope(torch.randn(3, 2, 128, dtype=torch.bfloat16))
        >>> b = torch.randn(2, 512, 128).to(torch.float8_e4m3fn)
        >>> bmm(a, a_scale, b, torch.ones(2, 4, 1), m=3).shape
        torch.Size([2, 3, 512])
    """
    if out is None:
        return _ops.bmm.default(a, a_scale, b, b_scale, m=m)
    _ops.bmm.out(a, a_scale, b, b_scale, m=m, c_out=out)
    return out


@names_types
def absorb_q(
    q_nope: Tensor,
    w_uk: Tensor,
    w_uk_scale: Tensor,
    q_pe: Tensor | None = None,
    out_scale: Tensor | None = None,
    *,
    activations: str = "exact",
    out: Tensor | None = None,
) -> Tensor:
    """Make the query that attention over MLA's latent cache reads, in one kernel.

    q[s, h, :R] = q_nope[s, h, :] · W_UK[h], with q_nope exact or quantized to FP8; q[s, h, R:] = q_pe[s, h, :].

    Args:
        q_nope: [S, H, D] bf16 or fp16, D a multiple of 128 up to 16,384; the last dim contiguous.
        w_uk: [H, R, D] float8_e4m3fn, R a multiple of 128 up to 16,384.
        w_uk_scale: [H, R/128, D/128] fp32, any strides.
        q_pe: [S, H, P] of q_nope's dtype, after RoPE; P a multiple of 16 up to 256. None: no rope columns.
        out_scale: fp32 with one element, on the device. Given, all of q is e4m3(clamp(q * (1 / out_scale), ±448)).
        activations: "exact", or "fp8": q_nope is quantized first, as by quantize_q_nope.
        out: [S, H, R+P] to write to; the last dim contiguous.

    Returns:
        [S, H, R+P] (latent columns, then rope columns: FlashMLA's and FlashInfer's order), contiguous; q_nope's dtype,
        or float8_e4m3fn with out_scale. Accumulated in fp32, rounded once.

    Raises:
        RuntimeError: another `activations`; rank, dtype, extents or strides of an argument; tensors on several devices;
            a tensor that requires grad; dtype, shape, device or overlap of `out`.

    Notes: with "fp8", a bf16 result without q_pe has the bits of bmm(*quantize_q_nope(q_nope), ...). A NaN or Inf in
    q_nope makes its (token, head) NaN; an Inf that leaves in FP8 is ±448. Safe in CUDA graphs.

    Source: DeepSeek-V2 paper, appendix C; the weights are `AbsorbedWeights.w_uk` and `.w_uk_scale`.

    Example:
        >>> weights = AbsorbedWeights.from_bf16(torch.randn(2 * 256, 512, dtype=torch.bfloat16), num_heads=2)
        >>> q_nope, q_pe = torch.randn(3, 2, 192, dtype=torch.bfloat16).split([128, 64], dim=-1)
        >>> absorb_q(q_nope, weights.w_uk, weights.w_uk_scale, q_pe).shape
        torch.Size([3, 2, 576])
    """
    options = mode("absorb_q", activations)
    if out is None:
        return _ops.absorb_q.default(q_nope, w_uk, w_uk_scale, q_pe, out_scale, **options)
    _ops.absorb_q.out(q_nope, w_uk, w_uk_scale, q_pe, out_scale, **options, q_out=out)
    return out


@names_types
def v_up(
    o_latent: Tensor,
    w_uv: Tensor,
    w_uv_scale: Tensor,
    out_scale: Tensor | None = None,
    *,
    activations: str = "exact",
    out: Tensor | None = None,
) -> Tensor:
    """Bring attention's latent output up to the value heads, in one kernel.

    v[s, h, :] = o_latent[s, h, :] · W_UV[h]ᵀ, with o_latent exact or quantized to FP8.

    Args:
        o_latent: [S, H, R] bf16 or fp16, R a multiple of 128 up to 16,384; the last dim contiguous.
        w_uv: [H, V, R] float8_e4m3fn, V a multiple of 128 up to 16,384.
        w_uv_scale: [H, V/128, R/128] fp32, any strides.
        out_scale: fp32 with one element, on the device. Given, v is e4m3(clamp(v * (1 / out_scale), ±448)).
        activations: "exact", or "fp8": o_latent is quantized first, as by quantize_q_nope.
        out: [S, H, V] to write to; the last dim contiguous.

    Returns:
        [S, H, V], contiguous, so that `.flatten(1)` is o_proj's input; o_latent's dtype, or float8_e4m3fn with
        out_scale.

    Raises:
        RuntimeError: another `activations`; rank, dtype, extents or strides of an argument; tensors on several devices;
            a tensor that requires grad; dtype, shape, device or overlap of `out`.

    Notes: a NaN or Inf makes its (token, head) NaN; an Inf that leaves in FP8 is ±448. Safe in CUDA graphs.

    Source: DeepSeek-V2 paper, appendix C; the weights are `AbsorbedWeights.w_uv` and `.w_uv_scale`.

    Example:
        >>> weights = AbsorbedWeights.from_bf16(torch.randn(2 * 256, 512, dtype=torch.bfloat16), num_heads=2)
        >>> v_up(torch.randn(3, 2, 512, dtype=torch.bfloat16), weights.w_uv, weights.w_uv_scale).shape
        torch.Size([3, 2, 128])
    """
    options = mode("v_up", activations)
    if out is None:
        return _ops.v_up.default(o_latent, w_uv, w_uv_scale, out_scale, **options)
    _ops.v_up.out(o_latent, w_uv, w_uv_scale, out_scale, **options, v_out=out)
    return out


@names_types
def v_up_quantized(
    o_latent: Tensor,
    w_uv: Tensor,
    w_uv_scale: Tensor,
    *,
    activations: str = "exact",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what v_up does and quantize each head's 128 values, in one kernel: the input of a block-FP8 o_proj.

    v_scale = max(amax(|v|), 1e-4) / 448 over a head; v_val = e4m3(clamp(v * (1 / v_scale), ±448)), from fp32.

    Args:
        o_latent: [S, H, R] bf16 or fp16, R a multiple of 128 up to 16,384; the last dim contiguous.
        w_uv: [H, 128, R] float8_e4m3fn: V must be 128, one scale group.
        w_uv_scale: [H, 1, R/128] fp32, any strides.
        activations: as v_up's; the output is e4m3 in both.
        out: v_val and v_scale to write to, of the shapes below; v_scale with any strides.

    Returns:
        v_val: [S, H*128] float8_e4m3fn, contiguous.
        v_scale: [S, H] fp32 with strides (1, ceil4(S)), as block-FP8 GEMMs read it.

    Raises:
        RuntimeError: another `activations`; rank, dtype, extents or strides of an argument; tensors on several devices;
            a tensor that requires grad; dtype, shape, device or overlap of `out`.

    Notes: a NaN or Inf makes its (token, head) NaN and no other. Safe in CUDA graphs.

    Source: DeepSeek-V3 paper, section 3.3.

    Example:
        >>> weights = AbsorbedWeights.from_bf16(torch.randn(2 * 256, 512, dtype=torch.bfloat16), num_heads=2)
        >>> o_latent = torch.randn(3, 2, 512, dtype=torch.bfloat16)
        >>> v_val, v_scale = v_up_quantized(o_latent, weights.w_uv, weights.w_uv_scale)
        >>> v_val.shape, v_scale.stride()
        (torch.Size([3, 256]), (1, 4))
    """
    options = mode("v_up_quantized", activations)
    if out is None:
        return _ops.v_up_quantized.default(o_latent, w_uv, w_uv_scale, **options)
    _ops.v_up_quantized.out(o_latent, w_uv, w_uv_scale, **options, val_out=out[0], scale_out=out[1])
    return out
