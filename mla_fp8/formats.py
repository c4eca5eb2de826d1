"""Numbers and their limits, each once for Python: e4m3 values, their fp32 scales, and the extents that the ops take.

A scale dequantizes, x ≈ value * scale, and covers 1x128 activations or a 128x128 block of weights. For C++ the same
stands in csrc/constants.h.
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest finite e4m3
GROUP = 128  # a scale's activations, and one side of its block of weights
AMAX_FLOOR = 1e-4  # least amax of a group: DeepGEMM's per_token_cast_to_fp8
MIN_AMAX_FLOOR = 1e-30  # the least floor that a caller may choose: below it 1 / scale would overflow fp32
SCALE_ROWS_MULTIPLE = 4  # rows of the scales that the ops allocate: 16 bytes of fp32

ACTIVATIONS = (torch.bfloat16, torch.float16)  # what the ops take
# e4m3 terms, of 4 significant bits each, that hold an activation's 8 or 11.
EXACT_TERMS = {torch.bfloat16: 2, torch.float16: 3}
MODES = ("exact", "fp8")  # of activations=: kept whole, as EXACT_TERMS, or quantized
MAX_EXTENT = 16_384  # of the products' N and K, which are multiples of GROUP
MAX_PE, PE_STEP = 256, 16  # columns of q_pe, and what they are a multiple of
WEIGHT_ALIGN_BYTES = 16  # addresses and strides of a weight, as TMA takes them


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Round `x / scale` to e4m3, as a product with the reciprocal; NaN stays NaN, what is too large becomes ±448."""
    return (x.float() * (torch.ones_like(scale) / scale)).clamp(-FP8_MAX, FP8_MAX).to(E4M3)


def dequantize_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """e4m3 [..., N, K] and fp32 [..., N/128, K/128] -> fp64 [..., N, K]."""
    return weight.double() * scale.double().repeat_interleave(GROUP, -2).repeat_interleave(GROUP, -1)
