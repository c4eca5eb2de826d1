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
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import Tensor, nn

from mla_fp8.attention import attend_latents
from mla_fp8.errors import require, require_int
from mla_fp8.formats import MODES
from mla_fp8.integrations.absorbed_layer import Fp8Layer, warn_once
from mla_fp8.integrations.layer_states import make_states
from mla_fp8.integrations.summary import Summary, refusal
from mla_fp8.integrations.supported import EAGER, MLA, WHERE, choose
from mla_fp8.integrations.supported import NAME as NAME

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "mla_fp8.integrations.transformers: install mla_fp8[transformers], got no transformers"
    ) from error

__all__ = ["Summary", "disable", "enable", "enabled", "refresh"]

OLDEST = "5.15"  # the first release whose caches hold latents
WEIGHTS = ("fp8", "unquantized")
INSTEAD = "write activations='fp8' for 'fp8' and weights='unquantized' for 'exact'"  # of projections=
SDPA_ONLY = ("softcap", "position_bias", "s_aux")  # arguments that torch's SDPA honours or refuses


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
        model: a transformers model of bf16 or fp16 (any floating dtype with "unquantized"), on its device, or a wrapper
            of one: torch.compile's, DDP's, PEFT's. Offloaded by accelerate, before or after; of transformers' tensor
            parallel, where each rank enables its own heads.
        activations: "exact" keeps them whole, as precise as rounding the results to the model's dtype; "fp8" quantizes
            them, with 2.6e-2 of noise in each product. As `absorb_q` and `v_up` take it.
        weights: "fp8" runs `absorb_q` and `v_up` on weights in FP8. "unquantized" runs plain products with kv_b_proj's
            own weights in the model's dtype: nothing in FP8, no dims ruled out, no memory; the plumbing, to compare
            with.
        checkpoint: directory of the FP8 checkpoint in DeepSeek's format that the model was loaded from: its FP8 blocks
            are read as they are (numbers of 16 bits are quantized), whatever prefix its names have; kv_b_proj's own
            values are not needed (on meta, packed, offloaded). None: what kv_b_proj computes, as it is where that is
            FP8 with a scale a 128x128 block, else quantized in such blocks, with loss. A layer with an adapter on
            kv_b_proj always is: the adapter is merged into what is absorbed.
        prefill_threshold: a forward of at least this many tokens a sequence runs expanded; 1: every one. None: those
            cheaper so, by a count of multiplications: with the published dims all that fill an empty cache, and
            from 47, 78, 94 or 99 tokens on those that follow on a cache of 128, 512, 2048 or 8192 (on a GPU from 34,
            56, 67 or 70).
        projections: gone; the error says what an old call writes now.

    Returns:
        the layers enabled, those skipped and why, and the bytes added.

    Raises:
        ImportError: a transformers older than 5.15.
        ValueError: an argument; a model that is enabled already, that selects tokens by an indexer, that is to return
            attention weights, without a layer that can be enabled, of fp32 weights with weights="fp8", or on a GPU that
            the ops have no kernels for; weights as in `AbsorbedWeights`. The model is untouched then.

    Notes: under autograd a forward runs expanded. The FP8 weights move with the model and are in no state_dict. They
    follow kv_b_proj: each absorbed step compares its parameters' counts of writes, and takes over what was loaded,
    trained or switched (an adapter) since; `refresh` has the exceptions. A model cast to fp32 later runs expanded, with
    a warning. Another attention implementation set later runs as if not enabled. A deepcopy is enabled too.
    `output_attentions` is refused.

    Source: DeepSeek-V2 paper (arXiv:2405.04434), appendix C.

    Example:
        >>> from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
        >>> small = DeepseekV3Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
        >>> model = DeepseekV3ForCausalLM(small).bfloat16()
        >>> enable(model).enabled
        ('model.layers.0.self_attn',)
    """
    if Version(transformers.__version__).release < Version(OLDEST).release:
        raise ImportError(f"{WHERE}: transformers must be {OLDEST} or later, got {transformers.__version__}")
    require(projections is None, WHERE, "projections", f"be left out ({INSTEAD})", repr(projections))
    require(activations in MODES, WHERE, "activations", "be 'exact' or 'fp8'", repr(activations))
    require(weights in WEIGHTS, WHERE, "weights", "be 'fp8' or 'unquantized'", repr(weights))
    if weights == "unquantized":
        require(activations == "exact", WHERE, "activations", "be 'exact' with 'unquantized'", repr(activations))
        require(checkpoint is None, WHERE, "checkpoint", "be None with 'unquantized'", repr(checkpoint))
    if prefill_threshold is not None:
        require_int(WHERE, "prefill_threshold", prefill_threshold, 1)
    layers, skipped = choose(model, weights, checkpoint)
    states, notes = make_states(layers, skipped, activations, weights, checkpoint)
    require(bool(states), WHERE, "model", MLA, refusal(model, layers, skipped))

    transformers.AttentionInterface.register(NAME, attention_forward)
    transformers.AttentionMaskInterface.register(NAME, transformers.AttentionMaskInterface()["sdpa"])
    for name, state in states.items():
        state.prefill_threshold, state.previous = prefill_threshold, layers[name].config._attn_implementation
    for name, state in states.items():
        layer = layers[name]
        layer.expand_kv = functools.partial(keep_latents, layer)
        layer.config._attn_implementation = NAME
        layer.register_load_state_dict_post_hook(after_load)
        setattr(layer, NAME, state)
    added = sum(state.memory_bytes for state in states.values() if isinstance(state, Fp8Layer))
    return Summary(tuple(states), skipped, added, notes)


def disable(model: nn.Module) -> None:
    """Undo `enable`: every layer is transformers' own again. Does nothing where nothing is enabled.

    Args:
        model: the model that was given to `enable`, or a deepcopy.

    Returns: nothing. Raises: nothing.
    Notes: an attention implementation that was set after `enable` stays.
    """
    layer: Any
    for layer in list(model.modules()):
        if NAME in layer._modules:
            if layer.config._attn_implementation == NAME:
                layer.config._attn_implementation = getattr(layer, NAME).previous
            hooks = layer._load_state_dict_post_hooks
            for key in [key for key, hook in hooks.items() if hook is after_load]:
                del hooks[key]
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


def refresh(model: nn.Module) -> None:
    """Take over weights that were written where torch does not count it: through `.data`, or under inference_mode.

    Other changes are noticed: `load_state_dict`, in-place updates under no_grad, optimizers, adapters switched or
    merged. In compiled code and CUDA graphs, which cannot look, call it after any of them but `load_state_dict`.
    The FP8 weights are overwritten in place where they own their memory, so that CUDA graphs stay valid.

    Args:
        model: the model that was given to `enable`.

    Returns: nothing.
    Raises: nothing; a layer whose weights cannot be taken runs expanded, with a warning that has its name and reason.

    Example:
        >>> from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
        >>> small = DeepseekV3Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
        >>> model = DeepseekV3ForCausalLM(small).bfloat16()
        >>> _ = enable(model)
        >>> _ = model.model.layers[0].self_attn.kv_b_proj.weight.data.mul_(2)
        >>> refresh(model)
    """
    for layer in model.modules():
        if NAME in layer._modules:
            getattr(layer, NAME).refresh(layer)


def after_load(layer: Any, _: Any) -> None:
    """Of `load_state_dict`: at once, for code that does not look before a step."""
    if NAME in layer._modules:
        getattr(layer, NAME).follows(layer)


def keep_latents(layer: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """`expand_kv` of an enabled layer: `attention_forward` takes the latents, any other attention does not."""
    if layer.config._attn_implementation == NAME:
        return kv_nope, k_rot
    return type(layer).expand_kv(layer, kv_nope, k_rot)


def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention: query [B, H, S, D+P] on what `expand_kv` gave -> [B, S, H, V] and no weights."""
    rule = f"be False for an enabled model ({EAGER})"
    require(not options.get("output_attentions"), NAME, "output_attentions", rule, True)
    sdpa, absorbed = transformers.AttentionInterface()["sdpa"], getattr(module, NAME, None)
    if absorbed is None:
        warn_once(f"mla_fp8: enable(model) was not called, or skipped {type(module).__name__}: it runs torch's SDPA")
        return sdpa(module, query, key, value, attention_mask, **options)
    differentiated = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    changed = options.get("dropout") or any(options.get(name) is not None for name in SDPA_ONLY)
    if differentiated or changed or not absorbed.takes(module, query, key) or not absorbed.follows(module):
        return sdpa(module, query, *absorbed.expand(module, key, value), attention_mask, **options)
    is_causal = options.get("is_causal")
    if attention_mask is None and query.shape[2] > 1 and (module.is_causal if is_causal is None else is_causal):
        # Causal from the top left, as SDPA has it: the queries are a sequence's first, a static cache may be longer.
        attention_mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril()
    q = absorbed.absorb(module, query)
    o_latent = attend_latents(q, key[:, 0], value[:, 0], attention_mask, scale=options["scaling"])
    return absorbed.up(module, o_latent), None
