"""Calls of humming-kernels 0.1.19, written against its source; nothing of it is imported before one.

Its GEMM takes 16-bit activations as they are, contiguous, and no strided memory. The weights it has
repacked before; on their way into the tensor core they become bf16, times their scales in bf16.
CONFIGS are two ways to keep the scales, and three tiles.
"""

import importlib
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mla_fp8.formats import GROUP

from .sides import BF16, Buffers, round_up

GEMM = "grouped_masked"  # of [H * S,k]: an expert's rows begin at each S-th, and expert_layout counts them
LOCKS = 2048  # of its layers, for sums that several CTAs share
ROW_STEP = 8  # of a tile
EVEN_ROWS, OVERLAP_ROWS = 64, 176  # at most, of its own choices of each kind of tile
# What its heuristics give many rows of K > 512: a warpgroup loads by TMA, another multiplies.
OVERLAP = {
    "mma_type": "wgmma",
    "num_stages": 4,
    "num_ctas_per_sm": 1,
    "use_warp_spec": True,
    "use_tma": True,
    "use_stream_k": False,
    "smem_reuse_mode": "none",
    "producer_stage_unroll": 1,
    "wgmma_split_issue_wait": True,
}
CONFIGS = tuple({"scales": scales, "tile": tile} for tile in ("own", "even", "overlap") for scales in ("block", "row"))


def prepare(b: Buffers, scales: str) -> tuple[Any, dict[str, Tensor]]:
    """Its layer's description, and repacked weights with fp32 scales of blocks or bf16 scales of
    rows, which it makes of FP8 checkpoints itself."""
    schema = importlib.import_module("humming.schema").HummingWeightSchema(
        b_dtype="float8e4m3",
        weight_scale_group_size=GROUP,
        weight_scale_group_size_n=GROUP if scales == "block" else 0,
    )
    w, _ = b.masked_inputs
    scale = b.w_scale if scales == "block" else b.w_scale.repeat_interleave(GROUP, dim=1).to(BF16)
    layer, tensors = importlib.import_module("humming.transform").prepare_and_transform_humming_tensors(
        {"weight": w.view(torch.int32), "weight_scale": scale},
        shape_n=b.side.n,
        shape_k=b.side.k,
        weight_schema=schema,
        num_experts=b.heads,
        torch_dtype=BF16,
        device=w.device,
    )
    return layer, tensors


def rows_of_tile(s: int, most: int) -> int:
    """The fewest tiles of one head's rows, and no more rows in each than that takes."""
    return round_up(-(-s // -(-s // most)), ROW_STEP)


def tuning(b: Buffers, layer: Any, tile: str) -> Mapping[str, Any]:
    """ "own": its heuristics' choice, which expects rows in unequal numbers; "even": the same kind
    of tile for equal ones, without sums shared by CTAs; "overlap": as above."""
    if tile == "overlap":
        rows = rows_of_tile(b.s, OVERLAP_ROWS)
        return OVERLAP | {"block_shape": (rows, 128, 64), "warp_shape": (rows, 32, 64)}
    own = importlib.import_module("humming.tune").get_heuristics_config(
        layer, shape_m=b.heads * b.s, gemm_type=GEMM, device=b.w.device
    )
    if tile == "own":
        return own
    rows = rows_of_tile(b.s, EVEN_ROWS)
    shapes = {name: (rows, *own[name][1:]) for name in ("block_shape", "warp_shape")}
    return own | shapes | {"use_stream_k": False}


def multiply(b: Buffers, x: Tensor, out: Tensor, scales: str, tile: str) -> None:
    """x [H,S,k], out [H,S,n], both contiguous."""
    layer, tensors = b.once(f"humming {scales}", partial(prepare, b, scales))
    _, tokens = b.masked_inputs
    importlib.import_module("humming.ops").humming_gemm(
        layer_config=layer.to_str(),
        compute_config=json.dumps({"gemm_type": GEMM}),
        tuning_config=b.once(f"humming {scales} {tile}", lambda: json.dumps(tuning(b, layer, tile))),
        inputs=x.view(-1, b.side.k),
        outputs=out.view(-1, b.side.n),
        weight=tensors["weight"],
        weight_scale=tensors["weight_scale"],
        expert_layout=tokens,
        locks=b.once("humming locks", partial(torch.zeros, LOCKS, dtype=torch.int32, device=x.device)),
    )
