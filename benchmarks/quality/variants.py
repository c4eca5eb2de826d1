"""The ways to run one trained model that evaluate.py compares, and models that show what is at
stake.

Each takes the fp32 model as transformers built it, leaves it alone, and gives a model that is
called in the same way.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from mla_fp8 import reference
from mla_fp8.formats import FP8_MAX, GROUP
from mla_fp8.integrations.absorbed_layer import UnquantizedLayer
from mla_fp8.integrations.transformers import NAME, enable
from mla_fp8.weights import AbsorbedWeights

ALWAYS = 10**9  # prefill_threshold: every token runs absorbed, as in decoding
PER_TENSOR_FLOOR = 1e-12  # the amax floor of SGLang's input_to_float8
Variant = Callable[[Any], Any]
Rounding = Callable[[Tensor], Tensor]


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def per_tensor(x: Tensor) -> Tensor:
    """x rounded to e4m3 with one scale for the whole tensor, in fp32."""
    amax = x.float().abs().amax().clamp_min(PER_TENSOR_FLOOR)
    scale = amax / torch.full_like(amax, FP8_MAX)
    return reference.to_fp8(x, scale).float() * scale


def per_group(x: Tensor) -> Tensor:
    """x rounded to e4m3 with a scale for 128 elements of a row, as the ops do, in fp32."""
    value, scale = reference.quantize(x)
    return value.float() * scale.repeat_interleave(GROUP, -1)


def unchanged(x: Tensor) -> Tensor:
    return x


def hf_fp32(model: Any) -> Any:
    return copy.deepcopy(model)


def hf_bf16(model: Any) -> Any:
    return copy.deepcopy(model).bfloat16()


def absorbed(model: Any) -> Any:
    """Plain products in the model's own dtype."""
    enable(model, weights="unquantized", prefill_threshold=ALWAYS)
    return model


def mla_fp8(model: Any, activations: Literal["exact", "fp8"] = "exact") -> Any:
    """`enable(model)`: this package's ops, on weights in FP8."""
    model = hf_bf16(model)
    enable(model, activations=activations, prefill_threshold=ALWAYS)
    return model


def with_kv_b_proj(model: Any, change: Rounding) -> Any:
    for layer in attentions(model):
        weight = layer.kv_b_proj.weight
        # As `enable` quantizes them: from bf16, which both FP8 variants start with.
        blocks = AbsorbedWeights.from_bf16(weight.detach().bfloat16(), layer.num_heads)
        weight.data = change(torch.cat(blocks.dequantize(), dim=1).flatten(0, 1)).to(weight.dtype)
    return model


def checkpoint_fp32(model: Any) -> Any:
    """fp32 arithmetic on the dequantized blocks: an FP8 checkpoint without any other rounding."""
    return with_kv_b_proj(hf_fp32(model), unchanged)


class RoundedLayer(UnquantizedLayer):
    """Weights and activations that FP8 rounded, and fp32 sums: what an FP8 product computes."""

    w_uk: Tensor  # [H, D, R] fp32
    w_uv: Tensor  # [H, V, R] fp32
    rounded: Rounding  # what becomes of q_nope and o_latent

    def absorb(self, layer: Any, query: Tensor) -> Tensor:
        q_nope, q_pe = query.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
        q_latent = self.rounded(q_nope) @ self.w_uk
        return torch.cat([q_latent.to(query.dtype), q_pe], dim=-1).transpose(1, 2)

    def up(self, layer: Any, o_latent: Tensor) -> Tensor:
        return torch.einsum("bshr,hvr->bshv", self.rounded(o_latent), self.w_uv).to(o_latent.dtype)


def rounding(model: Any, weights: Rounding, activations: Rounding, dtype: torch.dtype = torch.float32) -> Any:
    """Absorbed, all else in `dtype`, with `weights` applied to kv_b_proj's dequantized blocks."""
    exact = attentions(with_kv_b_proj(hf_fp32(model), weights))
    model = absorbed(copy.deepcopy(model).to(dtype))
    for layer, source in zip(attentions(model), exact, strict=True):
        state = RoundedLayer()
        plain = getattr(layer, NAME)
        state.prefill_threshold, state.previous = ALWAYS, plain.previous
        state.name, state.seen = plain.name, plain.seen
        state.w_uk, state.w_uv = state.heads(source)
        state.rounded = activations
        setattr(layer, NAME, state)
    return model


def tensor_once_fp32(model: Any) -> Any:
    """One scale for kv_b_proj as it was trained: no second rounding."""
    model = hf_fp32(model)
    for layer in attentions(model):
        layer.kv_b_proj.weight.data = per_tensor(layer.kv_b_proj.weight.data.bfloat16())
    return absorbed(model)


def one_head_doubled(model: Any) -> Any:
    """What a wrong scale could do: the first layer's first head hands on twice its values."""
    model = mla_fp8(model)
    getattr(attentions(model)[0], NAME).w_uv_scale[0] *= 2
    return model


VARIANTS: dict[str, Variant] = {
    "HF, fp32": hf_fp32,
    "absorbed, fp32": lambda model: absorbed(hf_fp32(model)),
    "HF, bf16": hf_bf16,
    "absorbed, bf16": lambda model: absorbed(hf_bf16(model)),
    # The blocks dequantized to bf16 at load, as vLLM and SGLang do on Hopper; bf16 products.
    "block FP8 weights": lambda model: absorbed(with_kv_b_proj(hf_bf16(model), unchanged)),
    "block FP8 weights, exact activations: mla_fp8": mla_fp8,
    "block FP8 weights and activations: mla_fp8": lambda model: mla_fp8(model, "fp8"),
    # The dequantized blocks quantized again with one scale for kv_b_proj: SGLang's
    # block_quant_to_tensor_quant.
    "per-tensor FP8 weights": lambda model: absorbed(with_kv_b_proj(hf_bf16(model), per_tensor)),
    # These weights, and activations with one scale a tensor, as FlashInfer's bmm_fp8 takes them.
    "per-tensor FP8 weights and activations": lambda model: rounding(model, per_tensor, per_tensor, torch.bfloat16),
    "a fault: one head's values doubled": one_head_doubled,
    "block FP8 weights, all else fp32": lambda model: rounding(model, unchanged, unchanged),
    "block FP8 weights and activations, all else fp32": lambda model: rounding(model, unchanged, per_group),
    "per-tensor FP8 weights, rounded once, all else fp32": tensor_once_fp32,
    "per-tensor FP8 weights, all else fp32": lambda model: rounding(model, per_tensor, unchanged),
    "per-tensor FP8 weights and activations, all else fp32": lambda model: rounding(model, per_tensor, per_tensor),
}
SPREAD_VARIANTS = [  # that are also run on heads whose weights differ in size
    "HF, bf16",
    "block FP8 weights, exact activations: mla_fp8",
    "per-tensor FP8 weights",
    "per-tensor FP8 weights and activations",
]


@torch.no_grad()
def spread(model: Any, octaves: int) -> Any:
    """The same function with head 0's W_UK and W_UV 2^octaves times as large, beside the other
    heads', as they were.

    q_proj's rows and o_proj's columns make up for it. All factors are powers of two: not a bit of
    any result changes where each head has scales of its own. Half of the octaves go up and half
    down, away from `amax_floor`.
    """
    model = copy.deepcopy(model)
    for layer in attentions(model):
        nope, v_dim = layer.qk_nope_head_dim, layer.v_head_dim
        factor = torch.full((layer.num_heads, 1, 1), 2.0 ** -(octaves // 2))
        factor[0] = 2.0 ** (octaves - octaves // 2)
        layer.kv_b_proj.weight.view(layer.num_heads, nope + v_dim, -1).mul_(factor)
        layer.q_proj.weight.view(layer.num_heads, layer.qk_head_dim, -1)[:, :nope].div_(factor)
        layer.o_proj.weight.view(-1, layer.num_heads, v_dim).div_(factor.view(1, -1, 1))
    return model


def without_attention(model: Any) -> Any:
    """Attention's output is zero: what is left sees one character."""
    model = hf_fp32(model)
    for layer in attentions(model):
        layer.o_proj.weight.data.zero_()
    return model


def seeing(characters: int) -> Variant:
    """Each layer sees this many characters, its own included."""

    def variant(model: Any) -> Any:
        model = hf_fp32(model)

        def call(ids: Tensor, **options: Any) -> Any:
            seen = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril().triu(1 - characters)
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            return model(ids, attention_mask=mask.expand(len(ids), -1, -1, -1), **options)

        return call

    return variant
