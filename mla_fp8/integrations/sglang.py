"""SGLang: quantize_q_nope in place of its quantization before the masked FP8 GEMMs around MLA's attention.

Before both absorbed products, SGLang quantizes x [H, S, K] (q_nope, K = 128; attention's output, K = 512) with
`per_token_group_quant_mla_deep_gemm_masked_fp8`, which returns what DeepGEMM's masked GEMM takes:

    x_val [H, M, K], x_scale [H, M, K/128], masked_m int32 [H] full of S, S, M          M = ceil(S/256)*256

SGLang calls `register` in every process that it starts (entry point group `sglang.srt.plugins`, SGLang 0.5.11 and
later). With MLA_FP8_SGLANG=1 it hooks this function; otherwise it does nothing at all.
"""

import functools
import importlib
import importlib.metadata
import inspect
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mla_fp8 import devices
from mla_fp8.formats import ACTIVATIONS, E4M3, GROUP, MAX_EXTENT, MIN_AMAX_FLOOR
from mla_fp8.ops import quantize_q_nope

__all__ = ["register"]

SWITCH = "MLA_FP8_SGLANG"
FUNCTION = "per_token_group_quant_mla_deep_gemm_masked_fp8"
MODULES = (
    "sglang.kernels.ops.quantization.fp8_kernel",  # where 0.5.16 to 0.5.23 define it
    "sglang.srt.layers.quantization.fp8_kernel",  # where 0.5.11 does
)
HOOKS = "sglang.srt.plugins.hook_registry"
M_ALIGNMENT = 256  # SGLang's own, DeepGEMM's largest tile
TABLE_ROWS = 1024  # up to here a launch that fills masked_m would show in the time: it comes from a table

Quantized = tuple[Tensor, Tensor, Tensor, int, int]
logger = logging.getLogger(__name__)
tables: dict[tuple[torch.device, int], tuple[Tensor, ...]] = {}


def register() -> None:
    """Have SGLang quantize with `quantize_q_nope`, if the environment variable MLA_FP8_SGLANG is 1.

    x_scale = max(amax(|x|), eps) / 448; x_val = e4m3(clamp(x * (1 / x_scale), ±448)), where SGLang divides by x_scale.

    Returns: nothing. Raises: nothing, whatever it finds in SGLang.

    Notes: where MLA_FP8_SGLANG is neither 0 nor 1, or where this SGLang has
    no such function, another signature of it or no hook registry, a warning says so and SGLang stays as it is. A call
    that `quantize_q_nope` does not take (another group_size or dtype, a GPU without kernels, ...) runs SGLang's own
    function, with one warning a reason. SGLang applies the hook once `register` has returned.

    Source: `HookRegistry` of SGLang 0.5.23; docs/sglang.md.

    Example:
        >>> register()  # MLA_FP8_SGLANG is not set
    """
    switch = os.environ.get(SWITCH, "")
    if switch in ("", "0"):
        return
    if switch != "1":
        logger.warning("register: %s must be 0 or 1, got %r: SGLang runs its own kernel", SWITCH, switch)
        return
    module, original = find()
    if module is None:
        step_aside("sglang", f"have {FUNCTION} in {' or '.join(MODULES)}", sglang_version())
        return
    expected, found = signature_of(around, skip=1), signature_of(original)
    if found != expected:
        step_aside(f"{FUNCTION}'s signature", f"be {expected}", str(found))
        return
    try:
        hooks = importlib.import_module(HOOKS)
        hooks.HookRegistry.register(f"{module}.{FUNCTION}", around, hooks.HookType.AROUND)
    except Exception as error:  # an ImportError, or whatever another registry makes of these arguments
        step_aside("sglang", f"have HookRegistry.register in {HOOKS}", f"{sglang_version()} ({error!r})")
        return
    logger.info("register: %s.%s runs mla_fp8.quantize_q_nope", module, FUNCTION)


def around(
    original: Callable[..., Quantized],
    x: Tensor,
    group_size: int = GROUP,
    eps: float = 1e-12,
    dtype: torch.dtype = E4M3,
) -> Quantized:
    """What SGLang calls: all parameters after the first are the ones that its function must have, defaults included."""
    reason = why_not(x, group_size, eps, dtype)
    if reason is not None:
        log_once(logging.WARNING, f"{FUNCTION}: {reason}: this call runs SGLang's own kernel")
        return original(x, group_size, eps, dtype)
    log_once(logging.INFO, f"{FUNCTION}: runs mla_fp8.quantize_q_nope on {x.device}")
    q_nope = x.transpose(0, 1)
    x_val, x_scale = quantize_q_nope(q_nope, m_alignment=M_ALIGNMENT, amax_floor=eps, zero_pad=False)
    rows = q_nope.shape[0]
    return x_val, x_scale, full_of(rows, x), rows, x_val.shape[1]


def why_not(x: Tensor, group_size: int, eps: float, dtype: torch.dtype) -> str | None:
    """The reason for which `quantize_q_nope` does not take a call, if there is one."""
    if x.dim() != 3:
        return f"x must have 3 dimensions, got {x.dim()}"
    if x.device.type not in ("cuda", "cpu"):
        return f"x must be on cuda or cpu, got {x.device.type}"
    if x.dtype not in ACTIVATIONS:
        return f"x must be bfloat16 or float16, got {x.dtype}"
    if x.stride(2) != 1:
        return f"x must have a contiguous last dimension, got stride {x.stride(2)}"
    if not 0 < x.shape[2] <= MAX_EXTENT or x.shape[2] % GROUP != 0:
        return f"x's last dimension must be a multiple of {GROUP} up to {MAX_EXTENT}, got {x.shape[2]}"
    if group_size != GROUP:
        return f"group_size must be {GROUP}, got {group_size}"
    if dtype != E4M3:
        return f"dtype must be {E4M3}, got {dtype}"
    if not MIN_AMAX_FLOOR <= eps < math.inf:
        return f"eps must be finite and at least {MIN_AMAX_FLOOR}, got {eps}"
    if x.requires_grad and torch.is_grad_enabled():
        return "x must not require grad, got requires_grad=True"
    return devices.why_not_on(x.device) if x.is_cuda else None


def full_of(rows: int, x: Tensor) -> Tensor:
    """masked_m, int32 [H] full of `rows`: a row of a table, not to be written to, where that saves a launch."""
    plain_cuda = type(x) is Tensor and x.is_cuda and not torch.compiler.is_compiling()
    if plain_cuda and rows <= TABLE_ROWS:
        key = x.device, x.shape[0]
        # What a stream capture allocates belongs to its graph: such a call takes a table made before, or none.
        if key not in tables and not torch.cuda.is_current_stream_capturing():
            tables[key] = row_counts(*key)
        if key in tables:
            return tables[key][rows]
    return torch.full((x.shape[0],), rows, dtype=torch.int32, device=x.device)


@torch.inference_mode(False)
def row_counts(device: torch.device, heads: int) -> tuple[Tensor, ...]:
    """At index m int32 [H] full of m. Copied from pageable memory, so written when this returns, for every stream."""
    table = torch.arange(TABLE_ROWS + 1, dtype=torch.int32).unsqueeze(1).repeat(1, heads)
    return table.to(device).unbind(0)


def find() -> tuple[str | None, Any]:
    """The module that has SGLang's function, and the function."""
    for name in MODULES:
        try:
            return name, getattr(importlib.import_module(name), FUNCTION)
        except Exception as error:  # whatever importing it may raise
            logger.debug("register: %s: %r", name, error)
    return None, None


def signature_of(function: Any, skip: int = 0) -> inspect.Signature | None:
    """Names, kinds and defaults of the parameters from `skip` on, without annotations; None where there is none."""
    try:
        parameters = [*inspect.signature(function).parameters.values()][skip:]
    except (TypeError, ValueError):
        return None
    return inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])


def sglang_version() -> str:
    try:
        return f"sglang {importlib.metadata.version('sglang')}"
    except importlib.metadata.PackageNotFoundError:
        return "sglang of an unknown version"


def step_aside(argument: str, rule: str, got: str) -> None:
    logger.warning("register: %s must %s, got %s: SGLang runs its own kernel", argument, rule, got)


def log_once(level: int, message: str) -> None:
    """Log a message the first time; never while torch.compile traces, which a log call would break."""
    if not torch.compiler.is_compiling():
        log_first(level, message)


@functools.cache
def log_first(level: int, message: str) -> None:
    logger.log(level, message)
