"""Finds libmla_fp8.so beside the compiled `_config` module and registers torch.ops.mla_fp8."""

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


LIBRARY = _find_library()
torch.ops.load_library(str(LIBRARY))
jit.register(LIBRARY)
