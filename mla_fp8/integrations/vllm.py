"""vLLM: both products of its MLA layers from FP8 weights, unpatched (docs/engines.md).

vLLM finds `register` by the entry point group vllm.general_plugins. With MLA_FP8_VLLM=1 it wraps two methods of
`MLAAttention`: its constructor, to see kv_b_proj's blocks before vLLM changes them, and
`process_weights_after_loading`, after which a `BlockFp8Weight` stands in the place of W_UK_T and of W_UV.
"""

import functools
import os
import time
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from mla_fp8.integrations.engine import StepAside, guarded
from mla_fp8.integrations.vllm_engine import NAMES, current_config, engine_reason, find
from mla_fp8.integrations.vllm_weights import NOT_READ, Held, Run, logger, put, reason_of, replace, take

__all__ = ["load_seconds", "register"]

SWITCH, OFF, ON, QUANTIZE = "MLA_FP8_VLLM", ("", "0"), "1", "quantize"
load_seconds = 0.0  # that the plugin's own steps have taken so far, of all layers


layers: "weakref.WeakKeyDictionary[nn.Module, Held]" = weakref.WeakKeyDictionary()
run = Run(0)  # the newest


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
        if held is None:
            return process(self, *args, **kwargs)
        if held.weights:
            for name in NAMES:  # vLLM makes its own again, and would write them into ours
                self.__dict__.pop(name, None)
        try:
            result = process(self, *args, **kwargs)
        except BaseException:
            held.blocks = None
            if held.weights:
                put(self, held.weights)
            raise
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


def run_of_new_layer() -> Run:
    """The newest run, or another one where a model has been loaded since, or one of other options is made."""
    global run  # noqa: PLW0603
    config_id = id(current_config())
    if run.loading or run.config_id != config_id:
        run.say()  # what it has not said: layers that were made and never loaded kept it waiting
        run = Run(config_id)
    return run


def watch(layer: Any, quantize: bool) -> None:
    """Be there when kv_b_proj has been loaded, or know why not."""
    held = layers[layer] = Held(run_of_new_layer())
    held.run.waiting.add(layer)
    try:
        held.reason = engine_reason(layer) or listen(layer, held, quantize)
    except Exception as error:
        held.reason = reason_of(error)


def listen(layer: Any, held: Held, quantize: bool) -> str:
    """See kv_b_proj's blocks as they are when they have been loaded: vLLM may quantize them again, in place."""
    projection = layer.kv_b_proj
    method: Any = getattr(projection, "quant_method", None)
    process = getattr(method, "process_weights_after_loading", None)
    if process is None:
        return f"kv_b_proj has a quant_method {type(method).__name__}"
    projection_by, held_by, layer_by = weakref.ref(projection), weakref.ref(held), weakref.ref(layer)

    @functools.wraps(process)
    def process_weights_after_loading(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        held, layer = held_by(), layer_by()
        if module is projection_by() and held is not None and layer is not None:
            timed("reading kv_b_proj", lambda: take(module, layer, held, quantize))
        return process(module, *args, **kwargs)

    method.process_weights_after_loading = process_weights_after_loading
    return NOT_READ
