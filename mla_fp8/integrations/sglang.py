"""SGLang: absorb_q and v_up from FP8 weights, in the place of the bf16 copies that SGLang makes of kv_b_proj.

SGLang's `post_load_weights` gives every MLA layer `w_kc` and `w_vc`, and its forward code multiplies by them with
torch.bmm. SGLang calls `register` in every process that it starts (entry point group `sglang.srt.plugins`, SGLang
0.5.11 and later). With MLA_FP8_SGLANG=1 it wraps around that method, and once SGLang's own has run puts a
`BlockFp8Weight` in the place of both; otherwise it does nothing at all.
"""

import functools
import importlib
import importlib.metadata
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mla_fp8.integrations import sglang_engine
from mla_fp8.integrations.engine import LayerDims, StepAside, Summary, as_weights, read_blocks, require_same_numbers
from mla_fp8.weights.block_fp8_weight import BlockFp8Weight

__all__ = ["register"]

SWITCH = "MLA_FP8_SGLANG"
HOOKS = "sglang.srt.plugins.hook_registry"
CLASS, METHOD = "DeepseekV2WeightLoaderMixin", "post_load_weights"
ATTENTION = "DeepseekV2AttentionMLA"
NAMES = ("w_kc", "w_vc")  # [H, D, R] and [H, R, V]
DEVICES = ("cuda",)

Pair = tuple[BlockFp8Weight, BlockFp8Weight]
load_seconds = 0.0  # what the plugin has added to loading in this process, over all layers of all models
logger = logging.getLogger(__name__)


def register() -> None:
    """Have SGLang multiply by FP8 weights, if the environment variable MLA_FP8_SGLANG is 1.

    torch.bmm(x, w_kc) runs `absorb_q`, and torch.bmm(x, w_vc) `v_up`, from kv_b_proj's own blocks.

    Returns: nothing. Raises: nothing, whatever it finds in SGLang.

    Notes: where MLA_FP8_SGLANG is neither 0 nor 1, or this SGLang has another loader or hook registry, a warning says
    so and SGLang stays as it is. SGLang applies the hook once `register` has returned. Each model that is loaded
    logs one line: layers, bytes freed, or why a layer keeps SGLang's own weights.

    Source: `DeepseekV2WeightLoaderMixin` and `HookRegistry` of SGLang 0.5.17 and 0.5.23.

    Example:
        >>> register()  # MLA_FP8_SGLANG is not set
    """
    switch = os.environ.get(SWITCH, "")
    if switch in ("", "0"):
        return
    if switch != "1":
        logger.warning("register: %s must be 0 or 1, got %r: SGLang keeps its own weights", SWITCH, switch)
        return
    try:
        method = getattr(getattr(importlib.import_module(sglang_engine.LOADER), CLASS), METHOD)
        taken = [*inspect.signature(method).parameters]
        if taken != ["self", "is_nextn", "weight_names"]:
            raise TypeError(f"its {METHOD} takes {taken}")
        hooks = importlib.import_module(HOOKS)
        hooks.HookRegistry.register(f"{sglang_engine.LOADER}.{CLASS}.{METHOD}", around, hooks.HookType.AROUND)
    except Exception as error:  # whatever importing it may raise
        rule = f"have {CLASS}.{METHOD}(is_nextn, weight_names) and {HOOKS}"
        got = f"{sglang_version()} ({error!r})"
        logger.warning("register: sglang must %s, got %s: SGLang keeps its own weights", rule, got)
        return
    logger.info("register: %s.%s is followed by mla_fp8", CLASS, METHOD)


def around(
    original: Callable[..., None], model: Any, is_nextn: bool = False, weight_names: Iterable[str] | None = None
) -> None:
    """What SGLang calls: its own method, one layer a call, and after each the weights of that layer replaced.

    One a call, so that a reload, when the cache fills the GPU, makes the 16-bit weights of one layer at a time.
    """
    names = None if weight_names is None else list(weight_names)
    summary = Summary(logger)
    try:
        reason = sglang_engine.why_not()
        layers = layers_of(model, is_nextn, names)
    except Exception as error:
        reason, layers = f"{error!r}", []
    if not layers or (reason and not any(pair_in(attention) for attention, _ in layers)):
        original(model, is_nextn, names)
        if reason:
            logger.warning("%s: no product from FP8: %s", type(model).__name__, reason)
        return
    for attention, own_names in layers:
        load_layer(functools.partial(original, model, is_nextn, own_names), attention, summary)
    attentions = [attention for attention, _ in layers]
    untouched = any(hasattr(each, "kv_b_proj") and getattr(each, "w_kc", 0) is None for each in attentions)
    if untouched and not any(map(pair_in, attentions)):
        original(model, is_nextn, names)  # a release that knows layers by other names
    if summary.layers:
        summary.say(f"{' and '.join(NAMES)} of {type(model).__name__}")


def layers_of(model: Any, is_nextn: bool, names: list[str] | None) -> list[tuple[Any, list[str] | None]]:
    """The attention of every layer that SGLang's method goes through, and the names by which it does that one only."""
    if is_nextn:
        return [(model.model.decoder.self_attn, names)]
    start, end = model.model.start_layer, model.model.end_layer
    if names is None:
        names = [f"model.layers.{i}.self_attn.kv_b_proj.weight" for i in range(start, end)]
    by_layer: dict[int, list[str]] = {}
    for name in names:
        if "kv_b_proj" in name:
            by_layer.setdefault(int(name.split(".")[2]), []).append(name)
    inside = [(i, own) for i, own in by_layer.items() if start <= i < end]
    return [(model.model.layers[i].self_attn, own) for i, own in inside]


def load_layer(original: Callable[[], None], attention: Any, summary: Summary) -> None:
    """Run SGLang's own method for this layer, with what is ours out of its way, and then replace what it made."""
    global load_seconds
    ours = pair_in(attention)
    new = ours is not None or (hasattr(attention, "w_kc") and attention.w_kc is None and attention.w_vc is None)
    if ours:  # into which SGLang would copy
        attention.w_kc = attention.w_vc = None
    try:
        original()
    except BaseException:
        if ours:
            attention.w_kc, attention.w_vc = ours
        raise
    if not new:  # weights of SGLang's own from an earlier call, whose addresses a CUDA graph may have
        return
    begin = time.perf_counter()
    try:
        replace(attention, ours, summary)
    except Exception as error:
        stayed = str(error) if isinstance(error, (StepAside, ValueError)) else f"mla_fp8 failed: {error!r}"
        summary.reasons[stayed] += 1
        if ours:
            logger.error("a reload: CUDA graphs that were captured before still read the old weights: %s", stayed)
    finally:
        load_seconds += time.perf_counter() - begin


def replace(attention: Any, ours: Pair | None, summary: Summary) -> None:
    """Put FP8 weights where SGLang has just put its own, or raise why not; then nothing has changed."""
    theirs = attention.w_kc, attention.w_vc
    if theirs[0] is None and theirs[1] is None:  # SGLang found no kv_b_proj here
        if ours:
            attention.w_kc, attention.w_vc = ours
        return
    pair = pair_of(attention, theirs[0].dtype)
    for name, tensor, weight in zip(NAMES, theirs, pair, strict=True):
        require_same_numbers(name, tensor, weight, most=0)  # both multiply in fp32 and round once
    if ours:
        for mine, new in zip(ours, pair, strict=True):
            mine.update_(new.weight, new.scale)
    else:
        summary.replaced(theirs, pair, tuple(attention.kv_b_proj.parameters()))
    attention.w_kc, attention.w_vc = ours or pair


def pair_of(attention: Any, dtype: torch.dtype) -> Pair:
    """A layer's kv_b_proj, as the checkpoint has it, as the two weights, or the reason for which it is not for us."""
    if ATTENTION not in (kind.__name__ for kind in type(attention).__mro__):
        raise StepAside(f"the attention is a {type(attention).__name__}, not a {ATTENTION}")
    if attention.use_deep_gemm_bmm:
        raise StepAside("SGLANG_USE_DEEPGEMM_BMM is on, whose GEMMs want their own weights")
    projection = attention.kv_b_proj
    if hasattr(projection, "base_layer"):
        raise StepAside("kv_b_proj has a LoRA")
    weight = getattr(projection, "weight", None)
    if weight is not None and weight.device.type not in DEVICES:
        raise StepAside(f"kv_b_proj is on {weight.device.type}, not on {' or '.join(DEVICES)}")
    heads = attention.num_local_heads, attention.qk_nope_head_dim, attention.v_head_dim
    return as_weights(read_blocks(projection, LayerDims(*heads, attention.kv_lora_rank), copy_w_uv=False), dtype)


def pair_in(attention: Any) -> Pair | None:
    """The weights that the plugin has given a layer before."""
    w_kc, w_vc = getattr(attention, "w_kc", None), getattr(attention, "w_vc", None)
    return (w_kc, w_vc) if type(w_kc) is type(w_vc) is BlockFp8Weight else None


def sglang_version() -> str:
    try:
        return f"sglang {importlib.metadata.version('sglang')}"
    except importlib.metadata.PackageNotFoundError:
        return "sglang of an unknown version"
