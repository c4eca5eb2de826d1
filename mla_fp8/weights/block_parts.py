"""The two parts of a `BlockFp8Weight`: e4m3 [H, N, K] and its fp32 block scales [H, N/128, K/128]."""

import torch
from torch import Tensor

from mla_fp8.errors import require
from mla_fp8.formats import E4M3, GROUP, WEIGHT_ALIGN_BYTES
from mla_fp8.weights.kv_b_proj import contiguous_copy, require_head_dim


def require_parts(where: str, weight: Tensor, scale: Tensor) -> None:
    """They are tensors of these dtypes."""
    for name, part, dtype in (("weight", weight, E4M3), ("scale", scale, torch.float32)):
        require(isinstance(part, Tensor), where, name, "be a Tensor", type(part).__name__)
        require(part.dtype == dtype, where, name, f"be {dtype}", part.dtype)


def require_blocks(where: str, weight: Tensor, scale: Tensor) -> None:
    """They belong together, and lie as the ops read them."""
    require(weight.dim() == 3, where, "weight", "have 3 dimensions", list(weight.shape))
    require(weight.shape[0] >= 1, where, "weight", "have at least one head", list(weight.shape))
    for argument, extent in zip(("weight's N", "weight's K"), weight.shape[1:], strict=True):
        require_head_dim(where, argument, extent)
    got = f"strides {list(weight.stride())}"
    require(weight.stride(2) == 1, where, "weight", "have a contiguous last dim", got)
    aligned = all(stride % WEIGHT_ALIGN_BYTES == 0 for stride in weight.stride()[:2])
    rule = f"have strides that are multiples of {WEIGHT_ALIGN_BYTES}, but for the last dim"
    require(aligned, where, "weight", rule, got)
    past = weight.storage_offset() % WEIGHT_ALIGN_BYTES if weight.is_cuda else 0  # whose memory begins at a multiple
    rule = f"start at a multiple of {WEIGHT_ALIGN_BYTES} bytes"
    require(past == 0, where, "weight", rule, f"an address that is {past} bytes past one")
    blocks = [weight.shape[0], *(extent // GROUP for extent in weight.shape[1:])]
    rule = f"be {blocks}, one scale a {GROUP}x{GROUP} block of weight"
    require(list(scale.shape) == blocks, where, "scale", rule, list(scale.shape))
    require(scale.device == weight.device, where, "scale", f"be on {weight.device}", scale.device)


def numbers(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[H, N, K]: the product in fp32, then rounded to `dtype`, as engines load them; in fp64 no number is rounded."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    blocks = weight.to(wide).unflatten(2, (-1, GROUP)).unflatten(1, (-1, GROUP))
    return (blocks * scale.to(wide)[:, :, None, :, None]).to(dtype).reshape(weight.shape)


def owned(part: Tensor) -> Tensor:
    """As it is if it is all of its storage, else a copy."""
    return part if part.untyped_storage().nbytes() == part.nbytes else contiguous_copy(part)
