"""What an engine's weight loader needs to put `BlockFp8Weight` in place of its 16-bit w_kc and w_vc; engine-free.

An engine makes two 16-bit tensors of each MLA layer's kv_b_proj, and multiplies by them with torch.bmm:

    q_nope [H, S, D] x w_kc [H, D, R]           attention's output [H, S, R] x w_vc [H, R, V]
"""

import collections
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mla_fp8.formats import ACTIVATIONS
from mla_fp8.weights.absorbed import AbsorbedWeights
from mla_fp8.weights.block_fp8_weight import BlockFp8Weight
from mla_fp8.weights.block_parts import numbers
from mla_fp8.weights.kv_b_proj import HeadDims


class Stay(Exception):
    """Says why a layer keeps the engine's own weights."""


class Pair(NamedTuple):
    """The two weights of a layer."""

    w_kc: BlockFp8Weight  # [H, D, R]; its parts are a transposed copy
    w_vc: BlockFp8Weight  # [H, R, V]; its FP8 values are a view of kv_b_proj's

    def added_bytes(self, kv_b_proj: Tensor) -> int:
        """What the parts hold beside kv_b_proj's own storage."""
        parts = [part for each in self for part in (each.weight, each.scale)]
        own = kv_b_proj.untyped_storage().data_ptr()
        return sum(part.nbytes for part in parts if part.untyped_storage().data_ptr() != own)

    def update_(self, other: "Pair") -> None:
        """Write the numbers of `other` to where mine are, so that CUDA graphs find them."""
        for mine, new in zip(self, other, strict=True):
            mine.update_(new.weight, new.scale)


def pair_of(weight: Tensor, weight_scale_inv: Tensor, dims: HeadDims, dtype: torch.dtype) -> Pair:
    """Cut kv_b_proj as it came from the checkpoint, for products in `dtype`; ValueError where the ops cannot."""
    cut = AbsorbedWeights.from_kv_b_proj(
        weight, weight_scale_inv, dims.num_heads, qk_nope_head_dim=dims.qk_nope_head_dim, v_head_dim=dims.v_head_dim
    )
    return Pair(BlockFp8Weight(cut.w_uk, cut.w_uk_scale, dtype), BlockFp8Weight(cut.w_uv, cut.w_uv_scale, dtype))


def require_equal(pair: Pair, w_kc: Tensor, w_vc: Tensor) -> None:
    """Raise Stay unless the engine's own weights are, number by number, those that the parts stand for.

    Engine and `BlockFp8Weight` both multiply value and scale in fp32 and round once, so no tolerance is needed.
    """
    for name, mine, theirs in (("w_kc", pair.w_kc, w_kc), ("w_vc", pair.w_vc, w_vc)):
        if not isinstance(theirs, Tensor) or theirs.dtype not in ACTIVATIONS:
            got = theirs.dtype if isinstance(theirs, Tensor) else type(theirs).__name__
            raise Stay(f"{name} must be bfloat16 or float16, got {got}")
        if list(theirs.shape) != [mine.weight.shape[0], mine.weight.shape[2], mine.weight.shape[1]]:
            raise Stay(f"{name} must be {list(mine.shape)}, got {list(theirs.shape)}")
        if theirs.device != mine.weight.device:
            raise Stay(f"{name} must be on {mine.weight.device}, got {theirs.device}")
        unlike = (numbers(mine.weight, mine.scale, theirs.dtype) != theirs.mT).sum().item()
        if unlike:
            raise Stay(f"{name} must be kv_b_proj's blocks dequantized, got other numbers")


@dataclass
class Report:
    """What became of a model's layers."""

    replaced: int = 0
    updated: int = 0
    freed_bytes: int = 0
    seconds: float = 0.0
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)  # why, and in how many layers

    def line(self, model: str) -> str:
        """All of it in one line."""
        stayed = "; ".join(f"{self.layers(count)} as the engine has them: {why}" for why, count in self.reasons.items())
        if not self.replaced:
            return f"{model}: no product from FP8: {stayed or 'no MLA layer'}"
        done = f"{model}: absorb_q and v_up from FP8 in {self.layers(self.replaced)}"
        return f"{done}, {self.freed_bytes / 1e6:.1f} MB freed, {self.seconds:.2f} s" + f"; {stayed}" * bool(stayed)

    @staticmethod
    def layers(count: int) -> str:
        return f"{count} layer" + "s" * (count != 1)
