"""Finds libmla_fp8.so beside the compiled `_config` module, registers torch.ops.mla_fp8, declares its C functions."""

import ctypes
import importlib.metadata
import importlib.util
from pathlib import Path

import torch

from mla_fp8 import jit

VERSION = importlib.metadata.version("mla_fp8")


def _find_library() -> Path:
    # In an editable install native files are not beside the Python sources; the import system knows where they are.
    spec = importlib.util.find_spec("mla_fp8._config")
    if spec is None or spec.origin is None:
        raise ImportError(
            "mla_fp8 is not built here: its module _config is missing. Run `pip install .` in its checkout."
        )
    library = Path(spec.origin).parent / "libmla_fp8.so"
    if not library.exists():
        raise ImportError(f"mla_fp8 is not built here: {library} is missing. Run `pip install .` in its checkout.")
    return library


_DEVICE_BYTES = 1024  # of mla_fp8_device's text
LIBRARY = _find_library()
torch.ops.load_library(str(LIBRARY))
_functions = ctypes.CDLL(str(LIBRARY))  # what is not declared here takes and returns ints
_functions.mla_fp8_cpu_instruction_set.restype = ctypes.c_char_p
_functions.mla_fp8_embedded_image.argtypes = ctypes.c_char_p, ctypes.POINTER(ctypes.c_size_t)
_functions.mla_fp8_embedded_image.restype = ctypes.c_void_p
_functions.mla_fp8_force_tile.argtypes = (ctypes.c_char_p,)
jit.register(_functions)


def cpu_instruction_set() -> str:
    """What the CPU kernels run on here, by the library's own choice: avx512, avx2 or portable."""
    return _functions.mla_fp8_cpu_instruction_set().decode()


def embedded_image(name: str) -> bytes:
    """The kernels of that name that were compiled into the library; empty without them."""
    size = ctypes.c_size_t()
    data = _functions.mla_fp8_embedded_image(name.encode(), ctypes.byref(size))
    return ctypes.string_at(data, size.value) if data else b""


def device(index: int) -> str:
    """What the library knows of a GPU, as in "num_sms=132 dram_gbps=3017.5": fields of `_config.Device`."""
    text = ctypes.create_string_buffer(_DEVICE_BYTES)
    failed = _functions.mla_fp8_device(ctypes.c_int(index), text, ctypes.c_size_t(_DEVICE_BYTES))
    said = text.value.decode(errors="replace")
    if failed:
        raise RuntimeError(said)
    return said


def force_tile(symbol: str | None) -> bool:
    """Make this thread's CUDA calls use a tile, or with None choose again; False where there is no such tile."""
    return _functions.mla_fp8_force_tile(None if symbol is None else symbol.encode()) == 0
