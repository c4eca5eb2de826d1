"""The weights of MLA's two absorbed products: from a checkpoint's kv_b_proj to `AbsorbedWeights`, and to a file."""

from mla_fp8.weights.absorbed import AbsorbedWeights

__all__ = ["AbsorbedWeights"]
