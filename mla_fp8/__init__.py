"""FP8 projections around MLA attention: q_nope and q_pe to an attention-ready q, o_latent to o_proj's input.

Beside the ops and their weights: `mla_fp8.attention`, attention over latents; `mla_fp8.config`, which kernel runs and
why; `mla_fp8.jit`, compiling before a CUDA graph; `mla_fp8.distributed`, DTensor; `mla_fp8.integrations.transformers`
and `mla_fp8.integrations.sglang`; `mla_fp8.weights.block_fp8_weight`, how often a weight ran from FP8;
`mla_fp8.reference`, every op in plain PyTorch.
"""

import importlib
from typing import Any

from mla_fp8 import _native, fake  # noqa: F401  (loads the op library, then describes its ops to torch.compile)
from mla_fp8.ops import absorb_q, bmm, quantize_q_nope, v_up, v_up_quantized
from mla_fp8.weights import AbsorbedWeights, BlockFp8Weight

__all__ = ["AbsorbedWeights", "BlockFp8Weight", "absorb_q", "bmm", "quantize_q_nope", "v_up", "v_up_quantized"]
__version__ = _native.VERSION

_MODULES = ("attention", "config", "distributed", "integrations", "jit", "reference")  # some take long to import


def __getattr__(name: str) -> Any:
    """A module of the package that is asked for as an attribute is imported then."""
    if name in _MODULES:
        return importlib.import_module(f"mla_fp8.{name}")
    raise AttributeError(f"module 'mla_fp8' has no attribute {name!r}")
