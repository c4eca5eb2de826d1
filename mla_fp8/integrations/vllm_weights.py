"""vLLM: the two weights of a layer, at its first load and at each reload (mla_fp8.integrations.vllm)."""

import logging
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mla_fp8.integrations.engine import (
    LayerDims,
    StepAside,
    Summary,
    as_weights,
    quantized,
    read_blocks,
    require_same_numbers,
)
from mla_fp8.integrations.vllm_engine import CLASS, NAMES, engine_reason
from mla_fp8.weights import AbsorbedWeights, BlockFp8Weight

NOT_READ = "kv_b_proj was not loaded"

Blocks = tuple[BlockFp8Weight, BlockFp8Weight]
logger = logging.getLogger("vllm.mla_fp8")  # below "vllm", so that its lines look like vLLM's and follow its level


@dataclass(eq=False)
class Run:
    """Layers that vLLM makes in a row and then loads in a row: a model's, or a draft model's. Each has its line."""

    config_id: int
    loading: bool = False
    waiting: "weakref.WeakSet[nn.Module]" = field(default_factory=weakref.WeakSet)  # made and not yet loaded
    summary: Summary = field(default_factory=lambda: Summary(logger))

    def say(self) -> None:
        if self.summary.layers:
            self.summary.say(" and ".join(NAMES))


@dataclass(eq=False)
class Held:
    """What the plugin knows of a layer."""

    run: Run
    blocks: AbsorbedWeights | None = None  # kv_b_proj's, taken before vLLM changed them, until the layer gets its own
    reason: str = NOT_READ  # why there are none
    loaded: bool = False  # once: from then on captured graphs may read what the layer has
    weights: Blocks | None = None  # in the layer, at addresses that stay; None: vLLM's own are
    made_of: tuple[int, ...] = ()  # `fingerprint` of what vLLM had made of the same kv_b_proj


def dims_of(layer: Any) -> LayerDims:
    return LayerDims(layer.num_heads, layer.qk_nope_head_dim, layer.v_head_dim, layer.kv_lora_rank)


def take(projection: nn.Module, layer: nn.Module, held: Held, quantize: bool) -> None:
    """Keep kv_b_proj's blocks, or the reason why not, for `replace`."""
    held.blocks, held.reason = None, NOT_READ
    if held.loaded and held.weights is None:
        return  # vLLM's own weights are in this layer, and stay
    try:
        held.blocks = read_blocks(projection, dims_of(layer), quantize=quantize)
    except Exception as error:
        held.reason = reason_of(error)


def reason_of(error: Exception) -> str:
    if isinstance(error, (StepAside, ValueError)):  # of ours, an argument's rule and what was got
        return str(error)
    logger.debug("mla_fp8: a step failed", exc_info=error)
    return f"mla_fp8 failed: {error!r}"


def replace(layer: Any, held: Held) -> None:
    """Put our weights where vLLM has just made its own, if they hold the same numbers; else leave vLLM's."""
    first, held.loaded = not held.loaded, True
    stock = tuple(layer._parameters.get(name) for name in NAMES)
    try:
        if held.weights is not None:
            refresh(layer, held, stock)
            put(layer, held.weights)
        elif first and (reason := engine_reason(layer)):
            raise StepAside(reason)
        elif first:
            weights = checked(held, stock)
            held.made_of = fingerprint(stock)
            put(layer, weights)
            held.weights = weights
            held.run.summary.replaced(stock, weights, tuple(layer.kv_b_proj.parameters()))
    except Exception as error:
        if not first:
            raise
        held.run.summary.reasons[reason_of(error)] += 1
    finally:
        held.blocks, held.reason = None, NOT_READ
        if first:
            held.run.loading = True
            held.run.waiting.discard(layer)
            if not held.run.waiting:
                held.run.say()


def checked(held: Held, stock: tuple[Any, ...]) -> Blocks:
    """The blocks that were read, as weights, once they are known to be vLLM's numbers."""
    if held.blocks is None:
        raise StepAside(held.reason)
    if any(not isinstance(tensor, Tensor) for tensor in stock):
        raise StepAside(f"{CLASS} made no {' and '.join(NAMES)}")
    weights = as_weights(held.blocks, stock[0].dtype)
    for name, tensor, weight in zip(NAMES, stock, weights, strict=True):
        require_same_numbers(name, tensor, weight)
    return weights


def fingerprint(stock: tuple[Any, ...]) -> tuple[int, ...]:
    """Numbers that tell two pairs of weights apart, but for a chance in billions."""
    sums = [tensor.detach().view(torch.int16).sum(1, dtype=torch.int64).flatten() for tensor in stock]
    return tuple(int((each * torch.arange(1, len(each) + 1, device=each.device)).sum()) for each in sums)


def refresh(layer: Any, held: Held, stock: tuple[Any, ...]) -> None:
    """After a reload: new numbers at the old addresses, which captured graphs read; so there is no stepping aside."""
    assert held.weights is not None
    try:
        made_of = fingerprint(stock)
        if held.blocks is None and made_of == held.made_of:
            return  # of a checkpoint without kv_b_proj
        for mine, new in zip(held.weights, reloaded(layer, held, stock), strict=True):
            mine.update_(new.weight, new.scale)
        held.made_of = made_of
    except Exception as error:  # numbers of before would go unseen, these do not
        logger.error("mla_fp8: its weights are NaN until a reload succeeds, this one failed: %s", reason_of(error))
        held.made_of = ()
        with torch.inference_mode():
            for mine in held.weights:
                mine.scale.fill_(float("nan"))


def reloaded(layer: Any, held: Held, stock: tuple[Any, ...]) -> Blocks:
    """The weights that a layer shall have from now on."""
    try:
        return checked(held, stock)
    except StepAside as reason:
        logger.warning("mla_fp8: reloaded kv_b_proj is quantized from vLLM's 16-bit weights, with loss: %s", reason)
    w_uk_t, w_uv = stock  # [H, D, R], [H, R, V]
    rows = torch.cat((w_uk_t, w_uv.mT), 1).flatten(0, 1)
    return as_weights(quantized(rows, dims_of(layer)), w_uk_t.dtype)


def put(layer: nn.Module, weights: Blocks) -> None:
    """As plain attributes: parameters are moved, cast, offloaded and reloaded by addresses that these have not."""
    for name, weight in zip(NAMES, weights, strict=True):
        layer._parameters.pop(name, None)
        layer.__dict__[name] = weight
