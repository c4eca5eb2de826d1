"""A checkpoint's directory: which safetensors file holds which tensor, its type and shape, some of its rows."""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mla_fp8.errors import require

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
WHERE = "from_safetensors"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/model
AGAIN = "`hf download` again fetches what a download left out"


class Header(NamedTuple):
    """What a file says of a tensor before its data."""

    kind: str  # as safetensors writes types: F8_E4M3, BF16, ...
    shape: list[int]

    def __str__(self) -> str:
        return f"{self.kind} {self.shape}"


def checkpoint_directory(directory: str | Path) -> Path:
    """It is there; if it is not, and looks like a model's name on the Hugging Face hub, say how to get a copy."""
    root, got = Path(directory), repr(str(directory))
    if HUB_ID.fullmatch(str(directory)) and not root.exists():
        got += f", which may be a model on the hub: `hf download {directory}` makes a local copy and prints where it is"
    require(root.is_dir(), WHERE, "directory", "be an existing directory", got)
    return root


def read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: broken JSON and broken UTF-8
        raise ValueError(f"{WHERE}: {path.name} must be a readable JSON file, got {path} ({error})") from error
    require(isinstance(content, dict), WHERE, path.name, "hold a JSON object", type(content).__name__)
    return content


def tensor_files(root: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    if not (root / INDEX_FILE).is_file():
        single = root / SINGLE_FILE
        got = repr(str(root))
        if (root / "snapshots").is_dir():
            got += ", a model's folder in the hub's cache: the checkpoint is one of the directories in snapshots/"
        require(single.is_file(), WHERE, "directory", f"hold {INDEX_FILE} or {SINGLE_FILE}", got)
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    weight_map: Any = read_json(root / INDEX_FILE).get("weight_map")
    ok = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())
    require(ok, WHERE, "weight_map", "map tensor names to file names", type(weight_map).__name__)
    paths = {shard: root / shard for shard in set(weight_map.values())}  # DeepSeek-V3's index: 91,000 names, 163 files
    return {tensor: paths[shard] for tensor, shard in weight_map.items()}


def header(files: dict[str, Path], name: str) -> Header:
    """The type and the shape of a tensor that `files` has; reads no data."""
    with _open(files[name]) as file:
        part = _slice(file, files[name], name)
        return Header(part.get_dtype(), list(part.get_shape()))


def read_rows(files: dict[str, Path], name: str, rows: slice | None = None) -> Tensor:
    """Map `rows` of a tensor, or all of it."""
    with _open(files[name]) as file:
        part = _slice(file, files[name], name)
        found: Tensor = part[:] if rows is None else part[rows.start : rows.stop]
        return found


def _slice(file: Any, path: Path, name: str) -> Any:
    from safetensors import SafetensorError

    try:
        return file.get_slice(name)
    except SafetensorError as error:
        raise ValueError(f"{WHERE}: {name} must be in {path.name}, got {error}") from error


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open  # here, for only checkpoints need it

    name = path.name or path  # "/" has none
    try:
        if not os.path.exists(path):  # False too where a name cannot be one
            got = f"a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else "no such file"
            raise ValueError(f"{WHERE}: {name} must be in {path.parent}, as its index says, got {got} ({AGAIN})")
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{WHERE}: {name} must be a whole safetensors file, got {path} ({error})") from error
