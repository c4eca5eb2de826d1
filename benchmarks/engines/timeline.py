"""What runs between q_b_proj and o_proj in every layer of a decode step, from a profiler's kernels.

A layer's linear weights run as FP8 GEMMs of a few names. Of the gaps between two such GEMMs only
one holds attention: it begins where q_b_proj's ends and ends where o_proj's begins. Whatever an
engine launches in between is inside, under any name.
"""

import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

LINEAR = re.compile(r"cutlass_3x_gemm|deep_gemm|fp8_gemm|w8a8_block_fp8", re.IGNORECASE)  # of vLLM and SGLang
ATTENTION = re.compile(r"flash|fmha", re.IGNORECASE)
NOT_KERNELS = ("Memcpy", "Memset")
NAME_LENGTH = 160  # of a name with all its template arguments


class Kernel(NamedTuple):
    start_us: float
    end_us: float
    name: str


class Window(NamedTuple):
    us: float
    kernels: list[Kernel]  # those between, times counted from q_b_proj's end


def kernels_of(profile: Any) -> list[Kernel]:
    """Those of a torch.profiler.profile."""
    device = (event for event in profile.events() if event.device_type.name == "CUDA")
    times = (Kernel(event.time_range.start, event.time_range.end, event.name) for event in device)
    return [kernel for kernel in times if not kernel.name.startswith(NOT_KERNELS)]


def windows(kernels: Iterable[Kernel]) -> list[Window]:
    """One a layer and step. What the record cut at its beginning or end is left out."""
    result: list[Window] = []
    before: Kernel | None = None
    between: list[Kernel] = []
    for kernel in sorted(kernels):
        if not LINEAR.search(kernel.name):
            between.append(kernel)
            continue
        if before is not None and any(ATTENTION.search(one.name) for one in between):
            zero = before.end_us
            shifted = [Kernel(one.start_us - zero, one.end_us - zero, one.name) for one in between]
            result.append(Window(kernel.start_us - zero, shifted))
        before, between = kernel, []
    return result


def summary(found: Sequence[Window]) -> dict[str, Any]:
    """Median and quantiles, and the kernels of the window in the middle: start, length, name."""
    if not found:
        raise ValueError("timeline: no attention between two FP8 GEMMs; see LINEAR and ATTENTION")
    ordered = sorted(found, key=lambda window: window.us)
    times = [window.us for window in ordered]
    middle = ordered[len(ordered) // 2]
    lengths = [(one.start_us, one.end_us - one.start_us, one.name[:NAME_LENGTH]) for one in middle.kernels]
    return {
        "us": statistics.median(times),
        "us_p20": times[len(times) // 5],
        "us_p80": times[len(times) * 4 // 5],
        "us_min": times[0],
        "windows": len(times),
        "kernels": [[round(start, 2), round(length, 2), name] for start, length, name in lengths],
    }
