"""kv_b_proj from a DeepSeek-format checkpoint directory: only the rows of one tensor-parallel rank, never pickle."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mla_fp8.errors import require, require_int
from mla_fp8.formats import GROUP
from mla_fp8.weights.kv_b_proj import HeadDims, require_head_dim

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
KV_B_PROJ = "model.layers.{layer}.self_attn.kv_b_proj"
WHERE = "from_safetensors"


class KvBProj(NamedTuple):
    """The rows of one rank, as the checkpoint has them; `weight_scale_inv` is None where the checkpoint is not FP8."""

    weight: Tensor  # [num_heads*(D+V), R]
    weight_scale_inv: Tensor | None  # [num_heads*(D+V)/128, R/128]
    dims: HeadDims  # of this rank
    scale_fmt: str | None


def read_kv_b_proj(directory: str | Path, layer: int, tp_rank: int, tp_size: int, name: str) -> KvBProj:
    """Read config.json, find and map the rows of `tp_rank`; `AbsorbedWeights.from_safetensors` has the rules."""
    root = Path(directory)
    require(root.is_dir(), WHERE, "directory", "be an existing directory", repr(str(directory)))
    require_int(WHERE, "layer", layer, 0)
    require_int(WHERE, "tp_size", tp_size, 1)
    require_int(WHERE, "tp_rank", tp_rank, 0)
    require(tp_rank < tp_size, WHERE, "tp_rank", f"be less than tp_size = {tp_size}", tp_rank)

    config = _read_json(root / "config.json")
    whole = HeadDims(*(_config_int(config, key) for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim")))
    kv_lora_rank = _config_int(config, "kv_lora_rank")
    require(whole.num_heads % tp_size == 0, WHERE, "tp_size", f"divide {whole.num_heads} heads", tp_size)
    require_head_dim(WHERE, "qk_nope_head_dim", whole.qk_nope_head_dim)
    require_head_dim(WHERE, "v_head_dim", whole.v_head_dim)
    require_head_dim(WHERE, "kv_lora_rank", kv_lora_rank)
    quantization = config.get("quantization_config") or {}
    require(isinstance(quantization, dict), WHERE, "quantization_config", "be a JSON object", repr(quantization))

    files = tensor_files(root)
    weight_name, scale_name = (_fill_in(name, layer) + end for end in (".weight", ".weight_scale_inv"))
    got = f"{layer}: there is no {weight_name}"
    require(weight_name in files, WHERE, "layer", f"be one of the checkpoint in {root}", got)
    dims = whole._replace(num_heads=whole.num_heads // tp_size)
    rows = slice(tp_rank * dims.rows, (tp_rank + 1) * dims.rows)
    weight, weight_type = _read_rows(files[weight_name], weight_name, [whole.rows, kv_lora_rank], rows)
    if not weight_type.startswith("F8_"):
        return KvBProj(weight, None, dims, None)

    block = quantization.get("weight_block_size", [GROUP, GROUP])
    require(block == [GROUP, GROUP], WHERE, "weight_block_size", f"be [{GROUP}, {GROUP}]", repr(block))
    rule = f"be in the checkpoint beside {weight_name} of type {weight_type}"
    require(scale_name in files, WHERE, scale_name, rule, "no such tensor")
    shape, blocks = [whole.rows // GROUP, kv_lora_rank // GROUP], slice(rows.start // GROUP, rows.stop // GROUP)
    scale, _ = _read_rows(files[scale_name], scale_name, shape, blocks)
    return KvBProj(weight, scale, dims, quantization.get("scale_fmt"))


def layers(directory: str | Path, name: str = KV_B_PROJ) -> list[int]:
    """The layers of a checkpoint that have a kv_b_proj, in ascending order."""
    root = Path(directory)
    require(root.is_dir(), WHERE, "directory", "be an existing directory", repr(str(directory)))
    pattern = re.compile(re.escape(name).replace(re.escape("{layer}"), r"(\d+)") + r"\.weight")
    return sorted(int(found[1]) for found in map(pattern.fullmatch, tensor_files(root)) if found)


def _fill_in(name: str, layer: int) -> str:
    try:
        return name.format(layer=layer)
    except (
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:  # of a broken template, and of a name that is no str
        raise ValueError(f"{WHERE}: name must be a str with at most {{layer}} in it, got {name!r} ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: broken JSON and broken UTF-8
        raise ValueError(f"{WHERE}: {path.name} must be a readable JSON file, got {path} ({error})") from error
    require(isinstance(content, dict), WHERE, path.name, "hold a JSON object", type(content).__name__)
    return content


def _config_int(config: dict[str, Any], key: str) -> int:
    value: Any = config.get(key)
    require_int(WHERE, f"config.json's {key}", value, 1)
    return int(value)


def tensor_files(root: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    if not (root / INDEX_FILE).is_file():
        single = root / SINGLE_FILE
        require(single.is_file(), WHERE, "directory", f"hold {INDEX_FILE} or {SINGLE_FILE}", repr(str(root)))
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    weight_map: Any = _read_json(root / INDEX_FILE).get("weight_map")
    ok = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())
    require(ok, WHERE, "weight_map", "map tensor names to file names", type(weight_map).__name__)
    return {tensor: root / shard for tensor, shard in weight_map.items()}


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open  # here, for only checkpoints need it

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        name = path.name or path  # "/" has none
        raise ValueError(f"{WHERE}: {name} must be a whole safetensors file, got {path} ({error})") from error


def _read_rows(path: Path, name: str, shape: list[int], rows: slice) -> tuple[Tensor, str]:
    """Map `rows` of the tensor `name`, whose whole shape must be `shape`; also its type as safetensors writes it."""
    from safetensors import SafetensorError

    with _open(path) as file:
        try:
            whole = file.get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{WHERE}: {name} must be in {path.name}, got {error}") from error
        got = whole.get_shape()
        require(got == shape, WHERE, name, f"have shape {shape}, as config.json's extents make it", got)
        return whole[rows.start : rows.stop], whole.get_dtype()
