"""What of a running SGLang makes the plugin leave all layers alone: platforms, options and environment variables."""

import importlib
import sys
from collections.abc import Callable

from mla_fp8.formats import GROUP

LOADER = "sglang.srt.models.deepseek_common.deepseek_weight_loader"
FORWARD = "sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla"
CONTEXT = "sglang.srt.runtime_context"
OFFLOADER = "sglang.srt.utils.offloader"
# Flags of the loader that say it is not on CUDA; those that a release lacks are not set.
OTHERS = ("_is_hip", "_is_npu", "_is_musa", "_is_xpu", "_is_cpu", "_is_fp8_fnuz", "_use_aiter_gfx95")


def platform() -> str | None:
    loader = importlib.import_module(LOADER)
    if not loader._is_cuda:
        return "the platform must be CUDA"
    other = [flag for flag in OTHERS if getattr(loader, flag, False)]
    return f"the platform must be CUDA, got {other[0]}" if other else None


def requantization() -> str | None:
    """After the loader, Blackwell's DeepGEMM has kv_b_proj rewritten in place, of which w_vc is a view."""
    loader = importlib.import_module(LOADER)
    if loader.should_deepgemm_weight_requant_ue8m0(weight_block_size=[GROUP, GROUP]):
        return "SGLang requantizes kv_b_proj to UE8M0 scales"
    return None


def offloader() -> str | None:
    """An offloader asks weights for their address, and moves kv_b_proj."""
    got = type(importlib.import_module(OFFLOADER).get_offloader()).__name__
    return None if got == "NoopOffloader" else f"no weight may be offloaded (--cpu-offload-gb), got {got}"


def lora() -> str | None:
    """An adapter of kv_b_proj adds to both products; which modules it has is known only later, if not said."""
    options = importlib.import_module(CONTEXT).get_lora()
    if not (options.enable_lora or options.lora_paths):
        return None
    targets = options.lora_target_modules or ["all"]
    if "all" in targets or "kv_b_proj" in targets:
        return "LoRA may be on kv_b_proj (--lora-target-modules can name modules without it)"
    return None


def weight_cache() -> str | None:
    """Weights that go from process to process by their address."""
    mode = importlib.import_module(CONTEXT).get_model().weight_cache_mode
    return None if mode == "off" else f"--weight-cache-mode must be off, got {mode}"


def fused_absorption() -> str | None:
    """A kernel of DeepSeek-V3.2 that reads w_kc by its address."""
    flag = "_ENABLE_DSA_Q8KV8_BORN_FP8_Q"
    on = getattr(sys.modules.get(FORWARD), flag, False)
    return "SGLANG_ENABLE_DSA_Q8KV8_BORN_FP8_Q is on, whose kernel reads w_kc in bf16" if on else None


RULES: tuple[Callable[[], str | None], ...] = (
    platform, requantization, offloader, lora, weight_cache, fused_absorption,
)  # fmt: skip


def why_not() -> str | None:
    """The reason for which no layer's weights are replaced, if there is one; that a name is missing is one, too."""
    for rule in RULES:
        try:
            reason = rule()
        except Exception as error:
            reason = f"this SGLang has no {rule.__name__} as known ({error!r})"
        if reason:
            return reason
    return None
