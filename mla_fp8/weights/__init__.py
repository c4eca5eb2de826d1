"""The weights of MLA's two absorbed products: from a checkpoint's kv_b_proj to `AbsorbedWeights`, to a file, and as one tensor."""

from mla_fp8.weights.absorbed import AbsorbedWeights
from mla_fp8.weights.block_fp8_weight import BlockFp8Weight

__all__ = ["AbsorbedWeights", "BlockFp8Weight"]
