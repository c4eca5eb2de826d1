"""Which attention layers of a transformers model can be enabled, and why others cannot."""

from pathlib import Path
from typing import Any

from torch import nn

from mla_fp8 import devices
from mla_fp8.errors import require
from mla_fp8.formats import GROUP, MAX_EXTENT, MAX_PE, PE_STEP
from mla_fp8.integrations import projection
from mla_fp8.integrations.absorbed_layer import DIMS
from mla_fp8.integrations.summary import refusal
from mla_fp8.weights.kv_b_proj import require_head_dim

NAME = "mla_fp8"  # of the attention, and of the attribute that an enabled layer has
WHERE = "enable"
MLA = "have an MLA layer that can be enabled"
EAGER = "use attn_implementation='eager' for them"


def is_mla(module: nn.Module) -> bool:
    """A layer of its own, and no wrapper around one, whose attributes a wrapper shows as its own."""
    return "kv_b_proj" in module._modules and "kv_lora_rank" in vars(module)


def is_attention(module: nn.Module) -> bool:
    return is_mla(module) or type(module).__name__.endswith("Attention")


def is_fsdp(model: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for module in model.modules() for cls in type(module).__mro__)


def why_not(layer: Any, weights: str, *, from_checkpoint: bool = False, fsdp: bool = False) -> str | None:
    """The reason for which a layer cannot be enabled, if there is one; its values are not looked at."""
    if not is_mla(layer):
        return "has no latent cache: not MLA"
    if not hasattr(layer, "expand_kv"):
        return "has no expand_kv: its cache holds keys and values"
    if getattr(projection.base(layer.kv_b_proj), "bias", None) is not None:
        return "kv_b_proj has a bias"
    if weights == "fp8" and (reason := why_not_dims(layer)):
        return reason
    device = projection.device_of(layer)
    if weights == "fp8" and device.type == "cuda" and (reason := devices.why_not_on(device)):
        return reason
    weight = getattr(projection.base(layer.kv_b_proj), "weight", None)
    if projection.is_dtensor(weight) and fsdp:
        return "is sharded by FSDP, which gathers kv_b_proj only while it runs"
    if projection.is_dtensor(weight) and projection.is_adapted(layer.kv_b_proj):
        return "kv_b_proj has an adapter on a DTensor"
    if reason := projection.why_not_sharded(weight):
        return reason
    if from_checkpoint and not projection.is_adapted(layer.kv_b_proj):
        return None
    return projection.why_not_weight(layer, weights)


def why_not_dims(layer: Any) -> str | None:
    """Every dim for which the FP8 ops have no kernels."""
    bad = []
    for dim in DIMS:
        value = getattr(layer, dim)
        is_rope = dim == "qk_rope_head_dim"
        ok = value % PE_STEP == 0 and 0 < value <= MAX_PE if is_rope else _is_head_dim(value)
        bad += [] if ok else [f"{dim} = {value}"]
    limits = f"multiples of {GROUP} to {MAX_EXTENT}, qk_rope_head_dim of {PE_STEP} to {MAX_PE}"
    return f"the FP8 ops have no kernels for {', '.join(bad)} ({limits})" if bad else None


def _is_head_dim(value: Any) -> bool:
    try:
        require_head_dim("", "", value)
    except ValueError:
        return False
    return True


def why_not_output(model: nn.Module) -> str | None:
    """A module whose config asks for attention weights, which nobody computes here."""
    for module in model.modules():
        config = vars(module).get("config")
        if getattr(config, "output_attentions", False) is True:
            return type(module).__name__
    return None


def selects_tokens(module: nn.Module) -> bool:
    """An indexer, or None in a layer that shares another's choice."""
    return "indexer" in module._modules or "indexer" in vars(module)


def indexed(layers: dict[str, Any]) -> dict[str, str]:
    """name -> reason of the layers that attend to some tokens only."""
    found = {}
    for name, layer in layers.items():
        dims = ", ".join(f"{dim} {getattr(layer, dim)}" for dim in DIMS if hasattr(layer, dim))
        found[name] = f"an indexer selects tokens ({dims})" if dims else "an indexer selects tokens"
    return found


def choose(model: nn.Module, weights: str, checkpoint: str | Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    """name -> attention layer, and name -> reason of those that cannot be enabled, as far as no values are needed."""
    layers = {name: module for name, module in model.named_modules() if is_attention(module)}
    for name, module in model.named_modules():
        require(NAME not in module._modules, WHERE, "model", "not be enabled (disable it first)", f"{name}, enabled")
    # Not skipped one by one: such layers choose by the attention's name, which all layers of a config share, how they
    # tell it of the tokens.
    if sparse := indexed({name: layer for name, layer in layers.items() if selects_tokens(layer)}):
        require(False, WHERE, "model", "attend to all tokens", refusal(model, layers, sparse))
    asked = why_not_output(model)
    require(asked is None, WHERE, "model", f"not return attention weights ({EAGER})", f"output_attentions in {asked}")
    options = {"from_checkpoint": checkpoint is not None, "fsdp": is_fsdp(model)}
    reasons = {name: why_not(layer, weights, **options) for name, layer in layers.items()}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    require(len(skipped) < len(layers), WHERE, "model", MLA, refusal(model, layers, skipped))
    return layers, skipped
