"""Products by a `BlockFp8Weight`: which calls the ops take, and the call itself."""

import functools
from typing import Any

import torch
from torch import Tensor

from mla_fp8 import devices
from mla_fp8.weights.uses import count_product

PRODUCTS = frozenset({torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__})
ops = torch.ops.mla_fp8
_absorb_q, _v_up = ops.absorb_q.out._op, ops.v_up.out._op
Weight = Any  # BlockFp8Weight, which imports this


def why_not(x: Any, weight: Weight, out: Any) -> str | None:
    """The reason for which the ops do not take this product, if there is one; it then runs as any other tensor's.

    `out` is the op's own matter but for what torch.bmm writes to and an op does not.
    """
    if not _is_plain(x, weight):
        return "the other factor must be a plain tensor"
    if weight._swapped:
        return "the weight must not be transposed"
    if x.dtype is not weight._dtype:
        return f"the other factor must be {weight._dtype}, got {x.dtype}"
    shape, (heads, k, _) = x.shape, weight._shape
    if len(shape) != 3 or shape[0] != heads or shape[2] != k:
        return f"the other factor must have shape [{heads}, *, {k}], got {list(shape)}"
    if x.stride(2) != 1:
        return f"the other factor must have a contiguous last dim, got strides {list(x.stride())}"
    if x.requires_grad and torch.is_grad_enabled():
        return "the other factor must not require grad"
    if out is not None and (not _is_plain(out, weight) or out.dim() != 3 or out.stride(2) != 1):
        return "out must be a plain tensor of 3 dimensions, the last one contiguous"
    return weight._refusal


def _is_plain(x: Any, weight: Weight) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, type(weight))


def multiply(x: Tensor, weight: Weight, out: Tensor | None) -> Tensor | None:
    """[H, S, K] x [H, K, N] -> [H, S, N], by the op that reads and writes token-major; None where it is not taken.

    Between Python and the op lies as little as can be: the op checks its arguments before it does anything, so the
    reason is looked for only where it refuses them.
    """
    try:
        if weight._slow or x.dtype is not weight._dtype:
            return None
        if out is None:
            result: Tensor = weight._make(x.transpose(0, 1), weight.weight, weight.scale).transpose(0, 1)
        elif weight._absorbs:
            _absorb_q(x.transpose(0, 1), weight.weight, weight.scale, q_out=out.transpose(0, 1))
            result = out
        else:
            _v_up(x.transpose(0, 1), weight.weight, weight.scale, v_out=out.transpose(0, 1))
            result = out
    except Exception:
        if why_not(x, weight, out) is None:
            raise
        return None
    count_product()
    return result


@functools.cache
def refusal(device: torch.device) -> str | None:
    """The reason for which no product runs on this device, if there is one."""
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"the device must be a CPU or a GPU of CUDA, got {device.type}"
    return devices.why_not_on(device) if torch.cuda.is_available() else None  # a fake tensor's, where there is no GPU
