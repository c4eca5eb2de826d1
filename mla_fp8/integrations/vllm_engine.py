"""What of vLLM makes the plugin leave a layer alone: its class, its configuration, the process that it runs in."""

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Collection
from typing import Any

from torch import nn

from mla_fp8.integrations.engine import StepAside

MODULE = "vllm.model_executor.layers.attention.mla_attention"
CLASS = "MLAAttention"
NAMES = ("W_UK_T", "W_UV")  # [H, D, R] and [H, R, V]
PARAMETERS = ("num_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "kv_b_proj")  # read from a layer
CONFIG = "vllm.config"
FUNCTIONS = ("process_weights_after_loading", "get_current_vllm_config_or_none")  # of the class, and of CONFIG
# A layer for which vLLM makes other weights, or a second copy of them: attribute -> what it means.
OTHER_WAYS = {
    "dcp_q_replicate": "decode context parallelism replicates its queries, from a copy of W_UK_T",
    "is_amx_bmm_enabled": "vLLM multiplies on AMX",
    "is_aiter_triton_fp8_bmm_enabled": "vLLM multiplies by ROCm's kernels",
    "is_aiter_triton_fp4_bmm_enabled": "vLLM multiplies by ROCm's kernels",
}
SHARED_LOADS = ("ipc_cache",)  # load formats whose weights belong to another process
WEIGHT_SERVER = "vllm.model_executor.model_loader.weight_cache.daemon"  # loads what those processes take


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
        config = importlib.import_module(CONFIG)
    except Exception as error:
        raise StepAside(f"vllm {version} must have {CLASS} in {MODULE}, got {error!r}") from error
    owners = dict(zip(FUNCTIONS, (attention, config), strict=True))
    names = [*parameters, *(name for name, owner in owners.items() if callable(getattr(owner, name, None)))]
    if lacks := lacking(names, source):
        wanted = ", ".join([*PARAMETERS, *NAMES, *FUNCTIONS])
        raise StepAside(f"{CLASS} of vllm {version} must use {wanted}, got none of {lacks}")
    return attention  # type: ignore[no-any-return]


def lacking(names: Collection[str], source: str) -> list[str]:
    """What the plugin uses and a class has not: of its constructor's parameters, its weights, and two functions."""
    lacks = [name for name in PARAMETERS if name not in names]
    quoted = source.replace("'", '"')
    lacks += [name for name in NAMES if f'"{name}"' not in quoted or f"self.{name}" not in source]
    return lacks + [name for name in FUNCTIONS if name not in names]


def current_config() -> Any:
    """The configuration for which vLLM makes a model just now, or None."""
    return importlib.import_module(CONFIG).get_current_vllm_config_or_none()


def engine_reason(layer: Any) -> str | None:
    """Why this engine, as it is configured, keeps its own weights in this layer."""
    config = current_config()
    if config is not None:
        offload = getattr(config, "offload_config", None)
        uva, prefetch = getattr(offload, "uva", None), getattr(offload, "prefetch", None)
        if getattr(uva, "cpu_offload_gb", 0) or getattr(prefetch, "offload_group_size", 0):
            return "weights are offloaded to the CPU"
        load_format = str(getattr(getattr(config, "load_config", None), "load_format", ""))
        if load_format in SHARED_LOADS:
            return f"weights of load format {load_format} belong to another process"
        if getattr(getattr(config, "parallel_config", None), "enable_elastic_ep", False):
            return "elastic expert parallelism sends a new rank the parameters that a model has"
    if called_from(WEIGHT_SERVER):
        return "other processes take this one's weights, by their names"
    return next((why for name, why in OTHER_WAYS.items() if getattr(layer, name, False)), None)


def called_from(module: str) -> bool:
    """Whether a function of this module is running in this thread."""
    frame = sys._getframe() if module in sys.modules else None
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None
