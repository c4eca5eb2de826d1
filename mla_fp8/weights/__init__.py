"""The weights of MLA's two absorbed products: a checkpoint's kv_b_proj as `AbsorbedWeights`, as files, as tensors."""

from mla_fp8.weights.absorbed import AbsorbedWeights
from mla_fp8.weights.block_fp8_weight import BlockFp8Weight

__all__ = ["AbsorbedWeights", "BlockFp8Weight"]
