"""Hugging Face transformers: MLA models decode absorbed, over the latents that their cache holds.

From 5.15 on transformers caches latents and expands them to keys and values at every step. `enable` takes the expansion
out of the layers that it enables (`expand_kv`, per instance) and registers one attention that makes up for it:

    few queries      q -> absorb_q -> attend_latents over the cache -> v_up -> o_proj
    a long prefill, or autograd        the layer's own expand_kv, then torch's SDPA, as before

Forward passes, caches, `generate` and `save_pretrained` stay transformers' own.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import Tensor, nn

from mla_fp8 import devices
from mla_fp8.attention import attend_latents
from mla_fp8.errors import require, require_int
from mla_fp8.formats import ACTIVATIONS, E4M3, MAX_PE, MODES, PE_STEP
from mla_fp8.integrations.absorbed_layer import Fp8Layer, UnquantizedLayer, warn_once
from mla_fp8.weights.kv_b_proj import UNQUANTIZED, require_head_dim

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "mla_fp8.integrations.transformers: install mla_fp8[transformers], got no transformers"
    ) from error

__all__ = ["Summary", "disable", "enable", "enabled"]

NAME = "mla_fp8"  # of the attention, and of the attribute that an enabled layer has
OLDEST = "5.15"  # the first release whose caches hold latents
WEIGHTS = ("fp8", "unquantized")
INSTEAD = "write activations='fp8' for 'fp8' and weights='unquantized' for 'exact'"  # of projections=
SDPA_ONLY = ("softcap", "position_bias", "s_aux")  # arguments that torch's SDPA honours or refuses


@dataclass(frozen=True)
class Summary:
    """What `enable` did.

    enabled: names of the layers that decode absorbed.
    skipped: name -> reason of every other attention layer; these run torch's SDPA.
    memory_bytes: bytes of the FP8 weights and scales that came beside kv_b_proj; 0 with weights="unquantized".
    """

    enabled: tuple[str, ...]
    skipped: dict[str, str]
    memory_bytes: int


def enable(
    model: nn.Module,
    *,
    activations: Literal["exact", "fp8"] = "exact",
    weights: Literal["fp8", "unquantized"] = "fp8",
    checkpoint: str | Path | None = None,
    prefill_threshold: int | None = None,
    projections: None = None,
) -> Summary:
    """Make the MLA layers of a transformers model decode absorbed, over their latent cache, with this package's ops.

    softmax(q · expand(cache)) expand(cache) becomes v_up(softmax(absorb_q(q) · cache) cache): the same sums in another
    order, without keys and values of every head.

    Args:
        model: a transformers model of bf16 or fp16 (any floating dtype with "unquantized"), on its device.
        activations: "exact" keeps them whole, as precise as rounding the results to the model's dtype; "fp8" quantizes
            them, with 2.6e-2 of noise in each product. As `absorb_q` and `v_up` take it.
        weights: "fp8" runs `absorb_q` and `v_up` on weights in FP8. "unquantized" runs plain products with kv_b_proj's
            own weights in the model's dtype: nothing in FP8, no dims ruled out, no memory; the plumbing, to compare
            with.
        checkpoint: directory of the FP8 checkpoint in DeepSeek's format that the model was loaded from: its FP8 blocks
            are read as they are. None: from kv_b_proj, as it is where that is FP8 with `weight_scale_inv`, else
            quantized in 128x128 blocks, with loss.
        prefill_threshold: a forward of at least this many tokens a sequence runs expanded; 1: every one. None: those
            cheaper so, by a count of multiplications: with the published dims all that fill an empty cache, and
            from 47, 78, 94 or 99 tokens on those that follow on a cache of 128, 512, 2048 or 8192 (on a GPU from 34,
            56, 67 or 70).
        projections: gone; the error says what an old call writes now.

    Returns:
        the layers enabled, those skipped and why, and the bytes added.

    Raises:
        ImportError: a transformers older than 5.15.
        ValueError: an argument; a model that is enabled already, that selects tokens by an indexer, without a layer
            that can be enabled, of fp32 weights with weights="fp8", or on a GPU that the ops have no kernels for;
            weights as in `AbsorbedWeights`. The model is untouched then.

    Notes: under autograd a forward runs expanded. The FP8 weights move with the model and are in no state_dict; weights
    loaded or trained later are not seen by them: disable and enable again. A model cast to fp32 later runs expanded,
    with a warning. Another attention implementation set later runs as if not enabled. A deepcopy is enabled too.
    `output_attentions` is refused, as with "sdpa".

    Source: DeepSeek-V2 paper (arXiv:2405.04434), appendix C.

    Example:
        >>> from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
        >>> small = DeepseekV3Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
        >>> model = DeepseekV3ForCausalLM(small).bfloat16()
        >>> enable(model).enabled
        ('model.layers.0.self_attn',)
    """
    where = "enable"
    if Version(transformers.__version__).release < Version(OLDEST).release:
        raise ImportError(f"{where}: transformers must be {OLDEST} or later, got {transformers.__version__}")
    require(projections is None, where, "projections", f"be left out ({INSTEAD})", repr(projections))
    require(activations in MODES, where, "activations", "be 'exact' or 'fp8'", repr(activations))
    require(weights in WEIGHTS, where, "weights", "be 'fp8' or 'unquantized'", repr(weights))
    if weights == "unquantized":
        require(activations == "exact", where, "activations", "be 'exact' with 'unquantized'", repr(activations))
        require(checkpoint is None, where, "checkpoint", "be None with 'unquantized'", repr(checkpoint))
    if prefill_threshold is not None:
        require_int(where, "prefill_threshold", prefill_threshold, 1)
    attentions = {n: m for n, m in model.named_modules() if type(m).__name__.endswith("Attention") or is_mla(m)}
    for name, module in model.named_modules():
        require(not hasattr(module, NAME), where, "model", "not be enabled (disable it first)", f"{name}, enabled")
        require(not hasattr(module, "indexer"), where, "model", "attend to all tokens", f"{name}, which has an indexer")

    reasons = {name: why_not(layer, weights) for name, layer in attentions.items()}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    rule, got = "have an MLA layer that can be enabled", skipped or type(model).__name__
    require(len(skipped) < len(attentions), where, "model", rule, got)
    layers = {name: layer for name, layer in attentions.items() if name not in skipped}
    states = {
        name: UnquantizedLayer() if weights == "unquantized" else Fp8Layer.of(name, layer, activations, checkpoint)
        for name, layer in layers.items()
    }

    transformers.AttentionInterface.register(NAME, attention_forward)
    transformers.AttentionMaskInterface.register(NAME, transformers.AttentionMaskInterface()["sdpa"])
    for name, layer in layers.items():
        states[name].prefill_threshold, states[name].previous = prefill_threshold, layer.config._attn_implementation
    for name, layer in layers.items():
        layer.expand_kv = functools.partial(keep_latents, layer)
        layer.config._attn_implementation = NAME
        setattr(layer, NAME, states[name])
    added = sum(state.memory_bytes for state in states.values() if isinstance(state, Fp8Layer))
    return Summary(tuple(layers), skipped, added)


def disable(model: nn.Module) -> None:
    """Undo `enable`: every layer is transformers' own again. Does nothing where nothing is enabled.

    Args:
        model: the model that was given to `enable`, or a deepcopy.

    Returns: nothing. Raises: nothing.
    Notes: an attention implementation that was set after `enable` stays.
    """
    layer: Any
    for layer in list(model.modules()):
        if hasattr(layer, NAME):
            if layer.config._attn_implementation == NAME:
                layer.config._attn_implementation = getattr(layer, NAME).previous
            del layer.expand_kv
            delattr(layer, NAME)


@contextmanager
def enabled(model: nn.Module, **options: Any) -> Iterator[Summary]:
    """Enable a model for a block: `enable(model, **options)`, then `disable(model)`, whatever happens.

    Args:
        model, options: as for `enable`.

    Returns: the summary of `enable`, as the block's variable.
    Raises: ImportError and ValueError as `enable`; then the block does not run.
    """
    summary = enable(model, **options)
    try:
        yield summary
    finally:
        disable(model)


def is_mla(module: nn.Module) -> bool:
    return hasattr(module, "kv_b_proj") and hasattr(module, "kv_lora_rank")


def why_not(layer: Any, weights: str) -> str | None:
    """The reason for which a layer cannot be enabled, if there is one."""
    if not is_mla(layer):
        return "has no latent cache: not MLA"
    if not hasattr(layer, "expand_kv"):
        return "has no expand_kv: its cache holds keys and values"
    weight = layer.kv_b_proj.weight
    if layer.kv_b_proj.bias is not None:
        return "kv_b_proj has a bias"
    if type(weight.data) is not Tensor or weight.is_meta:
        return f"kv_b_proj.weight is no plain tensor on a device, but {type(weight.data).__name__} on {weight.device}"
    if weights == "unquantized":
        return None if weight.dtype in UNQUANTIZED else f"kv_b_proj.weight is {weight.dtype}, for weights='fp8' only"
    if weight.dtype not in (*ACTIVATIONS, E4M3):
        return f"kv_b_proj.weight is {weight.dtype}; weights='fp8' takes bfloat16, float16 or float8_e4m3fn"
    if weight.is_cuda and (reason := devices.why_not_on(weight.device)):
        return reason
    try:
        for dim in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            require_head_dim("kv_b_proj", dim, getattr(layer, dim))
    except ValueError as error:
        return str(error)
    rope = layer.qk_rope_head_dim
    rope_ok = rope % PE_STEP == 0 and 0 < rope <= MAX_PE
    return None if rope_ok else f"qk_rope_head_dim must be a multiple of {PE_STEP} up to {MAX_PE}, got {rope}"


def keep_latents(layer: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """`expand_kv` of an enabled layer: `attention_forward` takes the latents, any other attention does not."""
    if layer.config._attn_implementation == NAME:
        return kv_nope, k_rot
    return type(layer).expand_kv(layer, kv_nope, k_rot)


def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention: query [B, H, S, D+P] on what `expand_kv` gave -> [B, S, H, V] and no weights."""
    sdpa, absorbed = transformers.AttentionInterface()["sdpa"], getattr(module, NAME, None)
    if absorbed is None:
        warn_once(f"mla_fp8: enable(model) was not called, or skipped {type(module).__name__}: it runs torch's SDPA")
        return sdpa(module, query, key, value, attention_mask, **options)
    differentiated = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    changed = options.get("dropout") or any(options.get(name) is not None for name in SDPA_ONLY)
    if differentiated or changed or not absorbed.takes(module, query, key):
        return sdpa(module, query, *absorbed.expand(module, key, value), attention_mask, **options)
    is_causal = options.get("is_causal")
    if attention_mask is None and query.shape[2] > 1 and (module.is_causal if is_causal is None else is_causal):
        # Causal from the top left, as SDPA has it: the queries are a sequence's first, a static cache may be longer.
        attention_mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril()
    q = absorbed.absorb(module, query)
    o_latent = attend_latents(q, key[:, 0], value[:, 0], attention_mask, scale=options["scaling"])
    return absorbed.up(module, o_latent), None
