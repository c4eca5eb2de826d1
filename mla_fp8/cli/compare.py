"""How far a result may be from `mla_fp8.reference`, and which element is farthest off where it is too far."""

import torch
from torch import Tensor

from mla_fp8 import reference
from mla_fp8.formats import GROUP

# The reference's sums for the kernels of a device: on CUDA what they add up, on a CPU what that is near to.
PRODUCT = {"cpu": reference.exact_product, "cuda": reference.tensor_core_product}
# How far theirs may be off, relative to the sum of the terms' magnitudes. On a CPU the product of an e4m3 and another,
# or a 16-bit number, is exact in fp32. A group of 128 rounds at most 127 times, then the scale product and the scaling
# once each, then one addition a group: for K = 7168 that is 127 + 2 + 56 < 2^8 roundings of 2^-24.
SUM_ERROR = {"cpu": 2.0**8 * 2.0**-24, "cuda": 0.0}

# Two values that round to neighbours are at most this far apart: relative to the value, and next to zero.
STEP = {
    torch.bfloat16: (2.0**-7, 0.0),
    torch.float16: (2.0**-10, 2.0**-24),
    torch.float8_e4m3fn: (2.0**-3, 2.0**-9),
    torch.float32: (2.0**-22, 0.0),  # two roundings: the amax of a scale, and its division
}
# Over many elements, of the norm. Sums that differ a little round to neighbours here and there: bf16 that was rounded
# otherwise than to nearest is off by 4e-3, e4m3 that was rounded to bf16 first by 1.15e-2.
FROBENIUS = {torch.bfloat16: 3e-3, torch.float16: 3e-3, torch.float8_e4m3fn: 6e-3, torch.float32: 1e-3}
MANY_ELEMENTS = 10_000


def sum_error(x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor) -> Tensor:
    """[S,H,K] x [H,N,K]ᵀ: how far each sum of the kernels may be from PRODUCT's, which takes the same."""
    x = (x.float() * (1 if x_scale is None else x_scale.repeat_interleave(GROUP, -1))).abs()
    terms = torch.einsum("shk,hnk->shn", x, reference.dequantize_blocks(w, w_scale).float().abs())
    return terms.double() * SUM_ERROR[x.device.type]


def same_bits(got: Tensor, want: Tensor) -> str:
    """Empty where all bits are equal, any NaN being equal to any NaN; else what differs."""
    if wrong := within(got, want, torch.zeros((), device=want.device), typical=False):
        return wrong
    x, y = got.float(), want.float()
    other_zeros = int(((x == 0) & (x.signbit() != y.signbit())).sum())
    return f"{other_zeros:,} of {want.numel():,} elements are zeros of the other sign" if other_zeros else ""


def within(got: Tensor, want: Tensor, error: Tensor, *, typical: bool = True, step: Tensor | None = None) -> str:
    """Empty where `got` may be `want`, computed with sums that are off by `error`; else what differs.

    Args:
        got, want: of one shape and dtype. NaN must be where NaN is; what is infinite must be equal.
        error: broadcast to `want`. Where it is 0, values must be equal.
        typical: the values are normal data, so that the norm of the difference says something too.
        step: what neighbours differ by, where the dtype does not say it.
    """
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return f"got {got.dtype} {list(got.shape)}, want {want.dtype} {list(want.shape)}"
    if want.numel() == 0:
        return ""
    relative, least = STEP[want.dtype] if step is None else (0.0, 0.0)
    x, y = got.double(), want.double()
    allowed = torch.where(error > 0, error + (y.abs() * relative + least if step is None else step), 0.0)
    far = ~((x - y).abs() <= allowed)  # NaN is far from everything
    wrong = torch.where(y.isnan(), ~x.isnan(), torch.where(y.isfinite(), far, x != y))
    if wrong.any():
        return f"{int(wrong.sum()):,} of {wrong.numel():,} elements differ, the worst at {_worst(wrong, x, y)}"
    norm = y.norm()
    off = float((x - y).norm() / norm) if typical and y.numel() >= MANY_ELEMENTS and norm > 0 else 0.0
    bound = FROBENIUS[want.dtype if step is None else torch.float8_e4m3fn]
    if off <= bound:
        return ""
    return f"relative error {off:.1e}, allowed {bound:.1e}, the worst element at {_worst(x != y, x, y)}"


def _worst(wrong: Tensor, got: Tensor, want: Tensor) -> str:
    distance = (got - want).abs().nan_to_num(nan=float("inf"))
    index = tuple(int(i) for i in torch.unravel_index(torch.where(wrong, distance, -1.0).argmax(), wrong.shape))
    return f"{list(index)}: got {got[index].item():.9g}, want {want[index].item():.9g}"
