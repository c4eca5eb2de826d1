"""kv_b_proj from a DeepSeek-format checkpoint directory: only the rows of one tensor-parallel rank, never pickle."""

import difflib
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla_fp8.errors import require, require_int
from mla_fp8.formats import AMAX_FLOOR, GROUP
from mla_fp8.weights.ambient import on_the_cpu
from mla_fp8.weights.kv_b_proj import HeadDims, cut_heads, quantize_blocks, require_head_dim
from mla_fp8.weights.scales import find_scale, read_scale, require_float, scale_format
from mla_fp8.weights.shards import (
    INDEX_FILE,
    WHERE,
    Header,
    checkpoint_directory,
    header,
    read_json,
    read_rows,
    tensor_files,
)

__all__ = [
    "INDEX_FILE",
    "KV_B_PROJ",
    "KvBProj",
    "layers",
    "look_up",
    "nearest",
    "read_kv_b_proj",
    "require_rank",
    "tensor_files",
]

KV_B_PROJ = "model.layers.{layer}.self_attn.kv_b_proj"
# Where multimodal models keep their language model: Kimi-K2.5 and Kimi-VL; what transformers saves.
OTHER_NAMES = ("language_model." + KV_B_PROJ, KV_B_PROJ.replace("model.", "model.language_model.", 1))
TEXT_CONFIGS = ("text_config", "language_config")  # where they keep its dims
NEAREST = 3  # names that a message lists


class KvBProj(NamedTuple):
    """The rows of one rank, as the checkpoint has them; `scale` is None where the checkpoint is not FP8."""

    weight: Tensor  # [num_heads*(D+V), R]
    scale: Tensor | None  # [num_heads*(D+V)/128, R/128], in the type of the file
    dims: HeadDims  # of this rank
    scale_fmt: str | None
    name: str  # of the scale, else of the weight


class Found(NamedTuple):
    """A layer's tensors and the extents that config.json gives them, before any data is read."""

    files: dict[str, Path]
    weight_name: str
    weight: Header
    scale_name: str | None  # None where the weight is not FP8
    dims: HeadDims  # of the whole layer
    kv_lora_rank: int
    scale_fmt: str | None


@on_the_cpu()
def look_up(directory: str | Path, layer: int, name: str) -> Found:
    """Find a layer's tensors, and refuse what no rank could load; reads headers only."""
    root = checkpoint_directory(directory)
    require_int(WHERE, "layer", layer, 0)
    config = read_json(root / "config.json")
    text = _text_config(config)
    dims = HeadDims(*(_config_int(text, key) for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim")))
    kv_lora_rank = _config_int(text, "kv_lora_rank")
    require_head_dim(WHERE, "qk_nope_head_dim", dims.qk_nope_head_dim)
    require_head_dim(WHERE, "v_head_dim", dims.v_head_dim)
    require_head_dim(WHERE, "kv_lora_rank", kv_lora_rank)

    files = tensor_files(root)
    base = next(
        (base for base in (_fill_in(spelled, layer) for spelled in _spellings(name)) if f"{base}.weight" in files),
        _fill_in(name, layer),
    )
    weight_name = f"{base}.weight"
    require(weight_name in files, WHERE, "layer", f"be one of the checkpoint in {root}", _missing(files, base, layer))
    weight = header(files, weight_name)
    require_float(weight_name, weight)
    shape = [dims.rows, kv_lora_rank]
    rule = f"have shape {shape}, as config.json's extents make it"
    require(weight.shape == shape, WHERE, weight_name, rule, weight.shape)
    if not weight.kind.startswith("F8_"):
        return Found(files, weight_name, weight, None, dims, kv_lora_rank, None)
    quantization = _quantization(config, text)
    scale_fmt = scale_format(quantization)
    scale_name = find_scale(files, base, weight, quantization, scale_fmt)
    return Found(files, weight_name, weight, scale_name, dims, kv_lora_rank, scale_fmt)


def require_rank(tp_rank: int, tp_size: int) -> None:
    require_int(WHERE, "tp_size", tp_size, 1)
    require_int(WHERE, "tp_rank", tp_rank, 0)
    require(tp_rank < tp_size, WHERE, "tp_rank", f"be less than tp_size = {tp_size}", tp_rank)


def read_kv_b_proj(directory: str | Path, layer: int, tp_rank: int, tp_size: int, name: str) -> KvBProj:
    """Find and map the rows of `tp_rank`; `AbsorbedWeights.from_safetensors` has the rules."""
    require_rank(tp_rank, tp_size)
    with on_the_cpu():
        found = look_up(directory, layer, name)
        whole = found.dims
        dims = whole._replace(num_heads=-(-whole.num_heads // tp_size))
        rows = slice(min(tp_rank * dims.rows, whole.rows), min((tp_rank + 1) * dims.rows, whole.rows))
        weight = _padded(read_rows(found.files, found.weight_name, rows), dims.rows)
        if found.scale_name is None:
            return KvBProj(weight, None, dims, None, found.weight_name)
        blocks = [whole.rows // GROUP, found.kv_lora_rank // GROUP]
        scale = read_scale(found.files, found.scale_name, blocks, slice(rows.start // GROUP, rows.stop // GROUP))
        return KvBProj(weight, _padded(scale, dims.rows // GROUP), dims, found.scale_fmt, found.scale_name)


def load_heads(found: KvBProj, quantize_bf16: bool, copy_w_uv: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `AbsorbedWeights` holds."""
    weight, scale, dims, scale_fmt, name = found
    if scale is not None:
        return cut_heads(WHERE, weight, scale, dims, scale_fmt, copy_w_uv, name)
    rule = "be float8_e4m3fn (quantize_bf16=True quantizes others, with loss)"
    require(quantize_bf16, WHERE, name, rule, weight.dtype)
    return cut_heads(WHERE, *quantize_blocks(WHERE, weight, dims, AMAX_FLOOR), dims, None, copy_w_uv=True)


def layers(directory: str | Path, name: str = KV_B_PROJ) -> list[int]:
    """The layers of a checkpoint that have a kv_b_proj, in ascending order."""
    files = tensor_files(checkpoint_directory(directory))
    return sorted({layer for spelled in _spellings(name) for layer in _layers(files, spelled)})


def nearest(directory: str | Path, name: str) -> list[str]:
    """Names in the checkpoint that look most like `name`, one of each kind that differs by numbers only."""
    return _nearest(tensor_files(checkpoint_directory(directory)), name)


def _nearest(files: dict[str, Path], name: str) -> list[str]:
    kinds: dict[str, str] = {}
    for other in (other for other in files if other.endswith(".weight")):
        kinds.setdefault(re.sub(r"\d+", "0", other), other)
    close = difflib.get_close_matches(re.sub(r"\d+|\{layer\}", "0", name), kinds, NEAREST, cutoff=0.5)
    return [kinds[kind] for kind in close]


def _layers(files: dict[str, Path], name: str) -> list[int]:
    pattern = re.compile(re.escape(name).replace(re.escape("{layer}"), r"(\d+)") + r"\.weight")
    return [int(found[1]) for found in map(pattern.fullmatch, files) if found and found.groups()]


def _spellings(name: str) -> tuple[str, ...]:
    """A model's module may be named otherwise than its tensors in a file, as Kimi-K2.5's are in transformers."""
    known = (KV_B_PROJ, *OTHER_NAMES)
    return tuple(dict.fromkeys((name, *known))) if name in known else (name,)


def _missing(files: dict[str, Path], base: str, layer: int) -> str:
    """What a message has after "got": the tensors beside the missing weight, else the nearest names."""
    text = f"{layer}: there is no {base}.weight"
    beside = sorted(other for other in files if other.startswith(base + "."))
    if beside:
        return f"{text}, but " + ", ".join(f"{other} {header(files, other)}" for other in beside)
    close = _nearest(files, base + ".weight")
    return text + (f"; the nearest names are {', '.join(close)}" if close else "")


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


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of config.json, which is all of it but for multimodal models."""
    if "kv_lora_rank" in config:
        return config
    nested = (config.get(key) for key in TEXT_CONFIGS)
    return next((part for part in nested if isinstance(part, dict) and "kv_lora_rank" in part), config)


def _quantization(config: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    found = config.get("quantization_config") or text.get("quantization_config") or {}
    require(isinstance(found, dict), WHERE, "quantization_config", "be a JSON object", repr(found))
    return dict(found)


def _config_int(config: dict[str, Any], key: str) -> int:
    value: Any = config.get(key)
    require_int(WHERE, f"config.json's {key}", value, 1)
    return int(value)


def _padded(part: Tensor, rows: int) -> Tensor:
    """With rows of zero bytes below, where tp_size leaves this rank fewer heads than the others: heads of zeros."""
    if part.shape[0] == rows:
        return part
    raw = part.contiguous().view(torch.uint8)  # torch.cat takes no float8
    return torch.cat([raw, raw.new_zeros(rows - raw.shape[0], raw.shape[1])]).view(part.dtype)
