"""FP8 projections around MLA attention: q_nope and q_pe to an attention-ready q, o_latent to o_proj's input."""

from mla_fp8 import _native, fake  # noqa: F401  (loads the op library, then describes its ops to torch.compile)
from mla_fp8.ops import absorb_q, bmm, quantize_q_nope, v_up, v_up_quantized
from mla_fp8.weights import AbsorbedWeights

__all__ = ["AbsorbedWeights", "absorb_q", "bmm", "quantize_q_nope", "v_up", "v_up_quantized"]
__version__ = _native.VERSION
