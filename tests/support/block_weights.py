"""What the tests of BlockFp8Weight multiply: weights of both products, and activations as engines have them."""

import torch
from helpers import randn, random_weight
from torch import Tensor

from mla_fp8 import BlockFp8Weight
from mla_fp8.formats import dequantize_blocks

HEADS = 3
# Name -> N, K: the two products, and one that both ops could run.
EXTENTS = {"w_uk": (512, 128), "w_uv": (128, 512), "square": (128, 128), "wide": (256, 384)}


def make(rng, extents="w_uk", heads=HEADS, dtype=torch.bfloat16, device="cpu") -> BlockFp8Weight:
    return BlockFp8Weight(*random_weight(rng, heads, *EXTENTS[extents], device=device), dtype=dtype)


def token_major(rng, weight: BlockFp8Weight, s=5, device=None) -> Tensor:
    """[S, H, K] as a slice of q[S, H, K+64]; its transpose(0, 1) is what torch.bmm takes."""
    heads, k = weight.weight.shape[0], weight.weight.shape[2]
    q = randn(rng, s, heads, k + 64, dtype=weight.dtype, device=device or weight.weight.device)
    return q[..., :k]


def op_result(x: Tensor, weight: BlockFp8Weight) -> Tensor:
    """[S, H, N] of the op of these extents."""
    op = torch.ops.mla_fp8.absorb_q if weight.weight.shape[2] == 128 else torch.ops.mla_fp8.v_up
    return op(x, weight.weight, weight.scale)


def exact_result(x: Tensor, weight: BlockFp8Weight) -> Tensor:
    """[S, H, N] in fp64."""
    return torch.einsum("shk,hnk->shn", x.double(), dequantize_blocks(weight.weight, weight.scale))
