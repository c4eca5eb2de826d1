"""What `info` prints, as plain values: versions, devices, kernels, the JIT cache, and the path of each op."""

import ctypes
import importlib.metadata
import platform
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from mla_fp8 import _native, devices, jit
from mla_fp8.config import tiles
from mla_fp8.explain.problem import DEFAULT_EXTENTS

PACKAGES = (
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "transformers",
    "matplotlib",
    "triton",
    "deep-gemm",
    "flashinfer-python",
)


def collect() -> dict[str, Any]:
    images = embedded()
    found = cpu_facts(), *map(cuda_facts, range(torch.cuda.device_count()))
    return {
        "versions": versions(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "library": str(_native.LIBRARY),
        "devices": list(found),
        "embedded": images,
        "jit": jit_facts(),
        "paths": [path for device in found for path in paths(device, images)],
        "no_cuda": "" if torch.cuda.device_count() else no_cuda(),
    }


def versions() -> dict[str, str | None]:
    return {
        "mla_fp8": _native.VERSION,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cuda_of_torch": torch.version.cuda,
        "cuda_of_driver": driver_version(),
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """The newest CUDA that the driver takes, as in "13.0", or None without a driver."""
    try:
        driver, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        found = driver.cuDriverGetVersion(ctypes.byref(number)) == 0
    except (OSError, AttributeError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if found else None


def no_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "there is no CUDA driver" if driver_version() is None else "torch sees no device"


def cpu_facts() -> dict[str, Any]:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return {
        "device": "cpu",
        "name": name,
        "instruction_set": _native.cpu_instruction_set(),
        "threads": torch.get_num_threads(),
        "capability_of_torch": torch.backends.cpu.get_cpu_capability(),
    }


def cuda_facts(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": found.name,
        "capability": devices.text((found.major, found.minor)),
        "sms": found.multi_processor_count,
        "memory_bytes": found.total_memory,
    }


def embedded() -> list[dict[str, Any]]:
    """The images in the library: its name, of architecture and op; how many compiled tiles it has; its size."""
    held = _held()
    sizes = {name: len(_native.embedded_image(name)) for name in held}
    return [{"image": name, "kernels": held[name], "bytes": size} for name, size in sizes.items() if size]


def _held() -> Counter[str]:
    """How many compiled tiles are in the image of each name."""
    return Counter(_image(divmod(tile.capability, 10), tile.op.name) for tile in tiles())


def _image(capability: tuple[int, ...], op: str) -> str:
    return f"{devices.folder(capability)}/{op}"


def jit_facts() -> dict[str, Any]:
    """The cache on disk; `current`: `jit.load` would take this file, for sources, options and compiler are the same."""
    directory = jit.cache_directory()
    current, problem = set(), ""
    try:
        current = {jit.cached_image(name) for name in _held()}
    except (RuntimeError, OSError) as error:  # no NVRTC, or no sources
        problem = str(error)
    files = [
        {"file": path.name, "bytes": path.stat().st_size, "current": path in current}
        for path in sorted(directory.glob("*.cubin"))
    ]
    return {"nvrtc": None if problem else nvrtc_version(), "problem": problem, "cache": str(directory), "files": files}


def nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    return ".".join(map(str, nvrtc.nvrtcVersion()[1:]))


def paths(device: dict[str, Any], images: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Per op: what runs a call on this device, and why that."""
    name = device["device"]
    if name == "cpu":
        path, why = "C++", f"{device['instruction_set']} kernels, the best of this CPU and build"
        return [{"op": op, "device": name, "path": path, "why": why} for op in DEFAULT_EXTENTS]
    capability = tuple(map(int, device["capability"].split(".")))
    if reason := devices.why_not(capability):
        return [{"op": op, "device": name, "path": "error", "why": reason} for op in DEFAULT_EXTENTS]
    refusal = jit.embedded_refusal(int(name.removeprefix("cuda:")))
    if not refusal:
        return [
            {"op": op, "device": name, "path": "embedded", "why": "the driver takes the image"}
            for op in DEFAULT_EXTENTS
        ]
    reason = "the driver refuses the image" if images else "built without nvcc"
    compiled = {op: _image(capability, op.removesuffix("_quantized")) for op in DEFAULT_EXTENTS}
    return [{"op": op, "device": name, **_compiled(image, reason)} for op, image in compiled.items()]


def _compiled(image: str, reason: str) -> dict[str, str]:
    try:
        cached = jit.cached_image(image) is not None
    except (RuntimeError, OSError) as error:  # no NVRTC, or no sources
        return {"path": "error", "why": f"{reason}; {error}"}
    return {"path": "NVRTC", "why": f"{reason}; " + ("in the JIT cache" if cached else "compiled at first use")}
