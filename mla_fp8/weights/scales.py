"""The block scales of an FP8 weight in a checkpoint, under each name, type and shape that holds the same numbers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_fp8.errors import require
from mla_fp8.formats import GROUP
from mla_fp8.weights.kv_b_proj import SCALE_DTYPES, SCALE_NAMES, decode_scale, same_numbers
from mla_fp8.weights.shards import WHERE, Header, header, read_rows

ZERO_POINT = "weight_zero_point"
COMPRESSED_TENSORS = "compressed-tensors"
FLOATS = ("BF16", "F16", "F32")
EXPONENTS = "F8_E8M0"


def require_float(name: str, weight: Header) -> None:
    """e4m3, or 16 or 32 bits a number: integers hold codes that mean something else."""
    ok = weight.kind in (*FLOATS, "F8_E4M3")
    require(ok, WHERE, name, "be float8_e4m3fn, or bfloat16, float16 or float32", weight)


def scale_format(quantization: dict[str, Any]) -> str | None:
    found = quantization.get("scale_fmt")
    return found if isinstance(found, str) else None


def find_scale(
    files: dict[str, Path], base: str, weight: Header, quantization: dict[str, Any], scale_fmt: str | None
) -> str:
    """The name of the scales beside `base`.weight, [rows/128, columns/128] once; refuses other kinds by name."""
    _require_blocks(quantization)
    there = [name for name in (f"{base}.{end}" for end in SCALE_NAMES) if name in files]
    beside = sorted(name for name in files if name.startswith(base + ".") and name != f"{base}.weight")
    got = ", ".join(f"{name} {header(files, name)}" for name in beside) or "no such tensor"
    rule = f"be in the checkpoint beside {base}.weight of type {weight.kind}"
    require(bool(there), WHERE, f"{base}.{SCALE_NAMES[0]} or .{SCALE_NAMES[1]}", rule, got)
    zero = f"{base}.{ZERO_POINT}"
    if zero in files:  # which a symmetric quantizer may have written all the same
        require(not read_rows(files, zero).float().any(), WHERE, zero, "be 0, for value * scale is the weight", got)
    blocks = [extent // GROUP for extent in weight.shape]
    for name in there:
        _require_scale(name, header(files, name), weight.shape, blocks, scale_fmt)
    if len(there) > 1:
        read = ((read_scale(files, name, blocks, None), name) for name in there)
        first, second = (decode_scale(WHERE, scale, scale_fmt, name) for scale, name in read)
        rule = f"hold the numbers of {there[0]}, as both are there"
        require(torch.equal(first, second), WHERE, there[1], rule, "others")
    return there[0]


def read_scale(files: dict[str, Path], name: str, blocks: list[int], rows: slice | None) -> Tensor:
    """`rows` of the scales as [rows, columns] of blocks, in the type of the file."""
    if header(files, name).shape == blocks:
        return read_rows(files, name, rows)
    whole = read_rows(files, name).reshape(blocks)
    return whole if rows is None else whole[rows]


def _require_blocks(quantization: dict[str, Any]) -> None:
    """compressed-tensors says blocks for groups of layers; the shape of the scales says them for this one."""
    if quantization.get("quant_method") == COMPRESSED_TENSORS:
        return
    block = quantization.get("weight_block_size", [GROUP, GROUP])
    require(block == [GROUP, GROUP], WHERE, "weight_block_size", f"be [{GROUP}, {GROUP}]", repr(block))


def _require_scale(name: str, scale: Header, weight: list[int], blocks: list[int], scale_fmt: str | None) -> None:
    count = 1
    for extent in scale.shape:
        count *= extent
    packed = "; packed int32 is an engine's own layout: convert from the checkpoint that it was made of"
    ok = scale.kind in (*FLOATS, EXPONENTS) or (scale.kind == "U8" and scale_fmt == "ue8m0")
    got = f"{scale} with scale_fmt {scale_fmt!r}" + packed * (scale.kind == "I32")
    require(ok, WHERE, name, SCALE_DTYPES, got)
    whose = {1: ", one a tensor", weight[0]: ", one a row"}.get(count, "")
    rule = f"have shape {blocks}, one scale a {GROUP}x{GROUP} block of weight"
    require(same_numbers(scale.shape, blocks), WHERE, name, rule, f"{scale}{whose}")
