"""AbsorbedWeights as one safetensors file: the four tensors under the names of the module's buffers, never pickle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mla_fp8.errors import require
from mla_fp8.weights.kv_b_proj import contiguous_copy

BUFFERS = ("w_uk", "w_uk_scale", "w_uv", "w_uv_scale")
METADATA = "mla_fp8"  # the only key, for safetensors writes several in any order, and equal weights make equal files


def write_weights(path: str | Path, tensors: Mapping[str, Tensor], origin: Mapping[str, int] | None = None) -> None:
    """Write `AbsorbedWeights.state_dict()` to `path`. Readers see what was there before or the whole new file.

    `origin` is kept as JSON under METADATA; nothing reads it.

    Raises: ValueError for other names than the four buffers'. OSError: the disk's.
    """
    from safetensors.torch import save  # here, for only files need it

    target, names = Path(path), sorted(tensors)
    require(names == sorted(BUFFERS), "write_weights", "tensors", f"be named {', '.join(BUFFERS)}", ", ".join(names))
    whole = {name: contiguous_copy(tensor.cpu()) for name, tensor in tensors.items()}  # w_uv may be a view
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(save(whole, metadata={METADATA: json.dumps({"class": "AbsorbedWeights", **(origin or {})})}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_weights(path: str | Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four tensors of a file that `write_weights` wrote, on the CPU, in the order of BUFFERS.

    Raises: ValueError for a missing or broken file, and for one that holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = "AbsorbedWeights.load"
    require(Path(path).is_file(), where, "path", "be an existing file", repr(str(path)))
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{where}: path must be a whole safetensors file, got {path} ({error})") from error
    names = sorted(tensors)
    require(names == sorted(BUFFERS), where, "path", f"hold {', '.join(BUFFERS)}", f"{', '.join(names)} in {path}")
    w_uk, w_uk_scale, w_uv, w_uv_scale = (tensors[name] for name in BUFFERS)
    return w_uk, w_uk_scale, w_uv, w_uv_scale
