"""Attention over MLA's latent cache: one function for every caller, whatever runs underneath."""

import warnings
from typing import Literal

import torch
from torch import Tensor

from mla_fp8.attention import backends
from mla_fp8.errors import require

__all__ = ["attend_latents"]

WHERE = "attend_latents"  # as errors name it
TORCH = "torch"
_failed: set[str] = set()  # libraries that are not asked again


def attend_latents(
    q: Tensor,
    kv_latent: Tensor,
    k_pe: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    backend: Literal["flash_mla", "flashinfer", "torch"] | None = None,
) -> Tensor:
    """Attend from absorbed queries to latents, which all heads share as keys and as values.

    o_latent[b, s, h] = sum over t of softmax_t(scale * q[b, s, h] · [kv_latent, k_pe][b, t]) * kv_latent[b, t].

    Args:
        q: [B, S, H, R+P] bf16, fp16 or fp32: latent columns, then rope columns, as `absorb_q` writes them.
        kv_latent: [B, T, R] of q's dtype, any strides: the cached latents.
        k_pe: [B, T, P] of q's dtype, any strides: the cached rope keys. A cache [B, T, R+P] is split into these views.
        mask: [B or 1, H or 1, S, T], True or 0 where token t is seen; a float mask is added. None: every t is seen.
        scale: the softmax scale of the model; YaRN models scale by more than (D+P)^-0.5.
        backend: None takes the first that is installed and can run the call. "flash_mla" (sgl-flash-mla) and
            "flashinfer" (flashinfer-python, which compiles at its first use) run bf16 on a GPU of compute capability
            9.0 with R = 512, P = 64, no mask and no gradient; FlashMLA where both caches are views of one [B, T, 576]
            with room for a multiple of 64 tokens. "torch" runs everything else: other dtypes and devices, masks,
            torch.compile, and CUDA graphs while they are captured.

    Returns:
        [B, S, H, R] of q's dtype, contiguous. Logits and softmax are fp32.

    Raises:
        ValueError: ranks, extents that disagree, dtypes that differ; mask's shape; a backend that cannot run the call,
            with the reason.

    Notes: a query that sees no token at all gets the mean of the latents, which is finite, not NaN. Traced whole by
    torch.compile. The backends agree within the rounding of softmax weights and results to q's dtype. A library that
    fails though nothing speaks against it is not asked again, with a warning, unless `backend` names it.

    Source: DeepSeek-V2 paper (arXiv:2405.04434), appendix C.

    Example:
        >>> cache = torch.randn(2, 9, 576, dtype=torch.bfloat16)
        >>> q = torch.randn(2, 1, 16, 576, dtype=torch.bfloat16)
        >>> attend_latents(q, *cache.split([512, 64], dim=-1), scale=192**-0.5).shape
        torch.Size([2, 1, 16, 512])
    """
    _check(q, kv_latent, k_pe, mask)
    traced = torch.compiler.is_compiling()
    require(not traced or backend in (None, TORCH), WHERE, "backend", "be None or torch under torch.compile", backend)
    chosen = None if traced else _library_for(backend, q, kv_latent, k_pe, mask, scale)
    if chosen is None:
        return _in_pytorch(q, kv_latent, k_pe, mask, scale)
    library, call = chosen
    try:
        on_stream = backends.planned(library, q.device, backends.stream_of(q))
        return on_stream.attend(call, q, kv_latent, k_pe)
    except Exception as failure:  # whatever a library throws, where PyTorch can do its work
        if backend is not None:
            raise
        _failed.add(library)
        warnings.warn(f"{WHERE}: {library} failed and is not asked again: {failure}", stacklevel=2)
        return _in_pytorch(q, kv_latent, k_pe, mask, scale)


def _check(q: Tensor, kv_latent: Tensor, k_pe: Tensor, mask: Tensor | None) -> None:
    for name, tensor, rank in (("q", q, 4), ("kv_latent", kv_latent, 3), ("k_pe", k_pe, 3)):
        require(tensor.dim() == rank, WHERE, name, f"have {rank} dimensions", list(tensor.shape))
        require(tensor.dtype == q.dtype, WHERE, name, f"be {q.dtype} as q is", tensor.dtype)
    (batch, queries, heads, width), (tokens, lora) = q.shape, kv_latent.shape[1:]
    for name, tensor, shape in (
        ("kv_latent", kv_latent, [batch, tokens, lora]),
        ("k_pe", k_pe, [batch, tokens, width - lora]),
    ):
        require(list(tensor.shape) == shape, WHERE, name, f"be {shape}", list(tensor.shape))
    if mask is not None:
        shapes = (batch, 1), (heads, 1), (queries,), (tokens,)
        ok = mask.dim() == 4 and all(extent in allowed for extent, allowed in zip(mask.shape, shapes, strict=True))
        require(ok, WHERE, "mask", f"broadcast to {[batch, heads, queries, tokens]}", list(mask.shape))


def _library_for(
    backend: str | None, q: Tensor, kv_latent: Tensor, k_pe: Tensor, mask: Tensor | None, scale: float
) -> tuple[str, backends.Call] | None:
    """The library to ask, and its call; or None for PyTorch."""
    names, reason = list(backends.PLANNERS), None
    known = backend in (None, TORCH, *names)
    require(known, WHERE, "backend", f"be one of {', '.join((TORCH, *names))}", repr(backend))
    if backend == TORCH:
        return None
    try:
        call = backends.call_of(q, kv_latent, k_pe, mask, scale)
        for name in [name for name in names if name not in _failed] if backend is None else [backend]:
            reason = backends.why_not(name, call, kv_latent, k_pe)
            if reason is None:
                return name, call
    except ValueError as error:
        reason = str(error)
    require(backend is None, WHERE, "backend", f"be one that can run the call ({reason})", repr(backend))
    return None


def _in_pytorch(q: Tensor, kv_latent: Tensor, k_pe: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    (batch, queries, heads, width), (tokens, lora) = q.shape, kv_latent.shape[1:]
    rows = q.reshape(batch, queries * heads, width)  # every head reads the same latents
    logits = _product(rows[..., :lora], kv_latent.mT) + _product(rows[..., lora:], k_pe.mT)
    logits = (logits * scale).view(batch, queries, heads, tokens)
    if mask is not None:
        lowest, mask = torch.finfo(torch.float32).min, mask.transpose(1, 2)  # a whole row of -inf would be NaN
        logits = logits.where(mask, lowest) if mask.dtype == torch.bool else (logits + mask).clamp_min(lowest)
    weights = logits.softmax(-1).view(batch, queries * heads, tokens)
    return _product(weights.to(q.dtype), kv_latent).to(q.dtype).view(batch, queries, heads, lora)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[B, M, K] x [B, K, N] -> fp32 [B, M, N], accumulated in fp32."""
    if torch.is_autocast_enabled(a.device.type):  # which would round a and b to 16 bits
        with torch.autocast(a.device.type, enabled=False):
            return _product(a, b)
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
