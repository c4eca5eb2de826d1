"""vLLM: both products of its MLA layers from FP8 weights, unpatched (docs/engines.md).

vLLM finds `register` by the entry point group vllm.general_plugins. With MLA_FP8_VLLM=1 it wraps two methods of
`MLAAttention`: its constructor, to see kv_b_proj's blocks before vLLM changes them, and
`process_weights_after_loading`, after which a `BlockFp8Weight` stands in the place of W_UK_T and of W_UV.
"""

import functools
import importlib
import importlib.metadata
import inspect
import logging
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mla_fp8.integrations.engine import (
    LayerDims,
    StepAside,
    Summary,
    as_weights,
    guarded,
    quantized,
    read_blocks,
    require_same_numbers,
)
from mla_fp8.weights import AbsorbedWeights, BlockFp8Weight

__all__ = ["load_seconds", "register"]

SWITCH, OFF, ON, QUANTIZE = "MLA_FP8_VLLM", ("", "0"), "1", "quantize"
MODULE = "vllm.model_executor.layers.attention.mla_attention"
CLASS = "MLAAttention"
NAMES = ("W_UK_T", "W_UV")  # [H, D, R] and [H, R, V]
PARAMETERS = ("num_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "kv_b_proj")  # read from a layer
CONFIG = "vllm.config"
# A layer for which vLLM makes other weights, or a second copy of them: attribute -> what it means.
OTHER_WAYS = {
    "dcp_q_replicate": "decode context parallelism replicates its queries, from a copy of W_UK_T",
    "is_amx_bmm_enabled": "vLLM multiplies on AMX",
    "is_aiter_triton_fp8_bmm_enabled": "vLLM multiplies by ROCm's kernels",
    "is_aiter_triton_fp4_bmm_enabled": "vLLM multiplies by ROCm's kernels",
}
SHARED_LOADS = ("ipc_cache",)  # load formats whose weights belong to another process

Weights = tuple[Tensor, ...]
Blocks = tuple[BlockFp8Weight, BlockFp8Weight]
logger = logging.getLogger("vllm.mla_fp8")  # below "vllm", so that its lines look like vLLM's and follow its level
load_seconds = 0.0  # that the plugin's own steps have taken so far, of all layers


@dataclass
class Held:
    """What the plugin knows of a layer."""

    blocks: AbsorbedWeights | None = None  # kv_b_proj's, taken before vLLM changed them, until the layer gets its own
    reason: str = "kv_b_proj was not loaded"  # why there are none
    weights: Blocks | None = None  # in the layer, at addresses that stay


layers: "weakref.WeakKeyDictionary[nn.Module, Held]" = weakref.WeakKeyDictionary()
waiting: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # layers that vLLM has made and not yet loaded
summary = Summary(logger)


def register() -> None:
    """Have vLLM run `absorb_q` and `v_up` from the checkpoint's FP8 blocks, if MLA_FP8_VLLM is 1 or quantize.

    Returns: nothing. Raises: nothing, whatever it finds in vLLM.

    Notes: MLA_FP8_VLLM unset or 0 touches nothing. 1 takes kv_b_proj in FP8 blocks of 128x128; quantize also takes one
    of 16 bits and quantizes it, with a loss (2.6e-2 for normal weights). A layer that it does not take keeps vLLM's
    own weights; one line a model says how many were taken, the bytes freed, and why others were not. Where this vLLM
    has no such class, or another one, a warning says so and all stays as it is.

    Source: `MLAAttention` of vLLM 0.26.0, 0.32.0 and 0.33.0; docs/engines.md.

    Example:
        >>> register()  # MLA_FP8_VLLM is not set
    """
    switch = os.environ.get(SWITCH, "")
    if switch in OFF:
        return
    if switch not in (ON, QUANTIZE):
        logger.warning("register: %s must be 0, 1 or quantize, got %r: vLLM runs its own products", SWITCH, switch)
        return
    try:
        hook(find(), quantize=switch == QUANTIZE)
    except StepAside as reason:
        logger.warning("register: %s: vLLM runs its own products", reason)
    except Exception as error:
        logger.warning("register: failed, vLLM runs its own products: %r", error)


def find() -> type[nn.Module]:
    """vLLM's MLA layer, if it has what the plugin uses."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    try:
        attention = getattr(importlib.import_module(MODULE), CLASS)
        parameters = inspect.signature(attention.__init__).parameters
        source = inspect.getsource(attention)
    except Exception as error:
        raise StepAside(f"vllm {version} must have {CLASS} in {MODULE}, got {error!r}") from error
    lacks = [name for name in PARAMETERS if name not in parameters]
    lacks += [name for name in NAMES if f'"{name}"' not in source or f"self.{name}" not in source]
    if lacks or not callable(getattr(attention, "process_weights_after_loading", None)):
        raise StepAside(f"{CLASS} of vllm {version} must use {', '.join([*PARAMETERS, *NAMES])}, got none of {lacks}")
    return attention  # type: ignore[no-any-return]


def hook(attention: Any, quantize: bool) -> None:
    """Wrap the class's constructor and its step after loading, once."""
    if hasattr(attention, "_mla_fp8_hooked"):
        return
    construct, process = attention.__init__, attention.process_weights_after_loading

    @functools.wraps(construct)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        timed("looking at a new layer", lambda: watch(self, quantize))

    @functools.wraps(process)
    def process_weights_after_loading(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        held = layers.get(self)
        mine = held.weights if held else None
        if mine:
            for name in NAMES:  # vLLM makes its own again, and would write them into ours
                self.__dict__.pop(name, None)
        try:
            result = process(self, *args, **kwargs)
        except BaseException:
            if mine:
                put(self, mine)
            raise
        if held:
            timed("replacing weights", lambda: replace(self, held))
        return result

    attention.__init__ = __init__
    attention.process_weights_after_loading = process_weights_after_loading
    attention._mla_fp8_hooked = True


def timed(what: str, step: Callable[[], None]) -> None:
    global load_seconds  # noqa: PLW0603  (a public figure)
    began = time.perf_counter()
    guarded(logger, what, step)
    load_seconds += time.perf_counter() - began


def dims_of(layer: Any) -> LayerDims:
    return LayerDims(layer.num_heads, layer.qk_nope_head_dim, layer.v_head_dim, layer.kv_lora_rank)


def watch(layer: Any, quantize: bool) -> None:
    """See kv_b_proj's blocks as they are when they have been loaded: vLLM may quantize them again, in place."""
    held = layers[layer] = Held()
    waiting.add(layer)
    projection = layer.kv_b_proj
    held_by, layer_by = weakref.ref(held), weakref.ref(layer)
    if reason := engine_reason(layer):
        held.reason = reason
        return
    method: Any = getattr(projection, "quant_method", None)
    process = getattr(method, "process_weights_after_loading", None)
    if process is None:
        held.reason = f"kv_b_proj has a quant_method {type(method).__name__}"
        return

    def take(module: nn.Module) -> None:
        now, owner = held_by(), layer_by()
        if now is not None and owner is not None:
            try:
                now.blocks, now.reason = read_blocks(module, dims_of(owner), quantize), ""
            except StepAside as reason:
                now.blocks, now.reason = None, str(reason)

    @functools.wraps(process)
    def process_weights_after_loading(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module is projection:
            timed("reading kv_b_proj", lambda: take(module))
        return process(module, *args, **kwargs)

    method.process_weights_after_loading = process_weights_after_loading


def engine_reason(layer: Any) -> str | None:
    """Why this engine, as it is configured, keeps its own weights in this layer."""
    config = importlib.import_module(CONFIG).get_current_vllm_config_or_none()
    if config is not None:
        offload = getattr(config, "offload_config", None)
        uva, prefetch = getattr(offload, "uva", None), getattr(offload, "prefetch", None)
        if getattr(uva, "cpu_offload_gb", 0) or getattr(prefetch, "offload_group_size", 0):
            return "weights are offloaded to the CPU"
        load_format = str(getattr(getattr(config, "load_config", None), "load_format", ""))
        if load_format in SHARED_LOADS:
            return f"weights of load format {load_format} belong to another process"
    return next((why for name, why in OTHER_WAYS.items() if getattr(layer, name, False)), None)


def replace(layer: Any, held: Held) -> None:
    """Put our weights where vLLM has just made its own, if they hold the same numbers; else leave vLLM's."""
    first = layer in waiting
    waiting.discard(layer)
    stock = tuple(layer._parameters.get(name) for name in NAMES)
    try:
        if (reason := engine_reason(layer)) and first:
            raise StepAside(reason)
        if any(not isinstance(tensor, Tensor) for tensor in stock):
            raise StepAside(f"{CLASS} made no {' and '.join(NAMES)}")
        if held.weights is None:
            held.weights = checked(held, stock)
        else:
            refresh(layer, held, stock)
        for name in NAMES:
            del layer._parameters[name]
        put(layer, held.weights)
        if first:
            summary.replaced(stock, held.weights)
    except StepAside as reason:
        if first:
            summary.reasons[str(reason)] += 1
    finally:
        held.blocks = None
        if first and not waiting:
            summary.say("W_UK_T and W_UV")


def checked(held: Held, stock: Weights) -> Blocks:
    """The blocks that were read, as weights, once they are known to be vLLM's numbers."""
    if held.blocks is None:
        raise StepAside(held.reason)
    weights = as_weights(held.blocks, stock[0].dtype)
    for name, tensor, weight in zip(NAMES, stock, weights, strict=True):
        require_same_numbers(name, tensor, weight)
    return weights


def refresh(layer: Any, held: Held, stock: Weights) -> None:
    """After a reload: new numbers at the old addresses, which captured graphs read; so there is no stepping aside."""
    assert held.weights is not None
    try:
        fresh = held.weights if held.blocks is None else checked(held, stock)
        for name, tensor, weight in zip(NAMES, stock, fresh, strict=True):
            require_same_numbers(name, tensor, weight)
    except StepAside as reason:
        logger.warning("mla_fp8: reloaded kv_b_proj is quantized from vLLM's 16-bit weights, with loss: %s", reason)
        w_uk_t, w_uv = stock  # [H, D, R], [H, R, V]
        rows = torch.cat((w_uk_t, w_uv.mT), 1).flatten(0, 1)
        fresh = as_weights(quantized(rows, dims_of(layer)), w_uk_t.dtype)
    for mine, new in zip(held.weights, fresh, strict=True):
        if mine is not new:
            mine.update_(new.weight, new.scale)


def put(layer: nn.Module, weights: Blocks) -> None:
    """As plain attributes: parameters are moved, cast, offloaded and reloaded by addresses that these have not."""
    for name, weight in zip(NAMES, weights, strict=True):
        layer.__dict__[name] = weight
