"""Launches of triton_kernels.py on buffer sets; among them the floor, and the stream ceiling.

The floor is one launch that reads and writes a side's bytes with no mathematics. Its kernel
(move_kernel) is tuned for every shape over tile size, work a program and cache policy; the fastest
is the floor. At large S half of its programs only write, or only read, which DRAM serves 5 to 10%
faster than both at once (docs/notes.md). It reads the side's own buffers, so its weights are as
cold as a contender's. Unlike ops that use programmatic dependent launch it never overlaps with its
predecessor, so an op can come out a little below it.

CUDA C++ is no better at this (docs/notes.md).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mla_fp8.formats import E4M3, GROUP

from . import timing
from .sides import FP32, ROPE_DIM, Buffers, Side, round_up, words

SMS = 132
PROGRAMS_AN_SM = 8
MAX_ROWS_A_PROGRAM = 16
WORDS_A_THREAD = 4  # 16 bytes
WARP = 32
CEILING_BYTES = 1 << 30
QUICK_SHAPES = 2


@functools.cache
def has_triton() -> str:
    """Empty, or why Triton's kernels cannot run."""
    try:
        from . import triton_kernels  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def triton_configs(side: Side, s: int) -> tuple[dict[str, Any], ...]:
    """block_m, block_n, walk, warps of project_kernel: those that may be the fastest at S."""
    large = [(64, 128, 1, 4), (64, 128, 4, 4), (128, 128, 1, 8)]
    if side.k == GROUP:
        small = [(16, 64, 1, 4), (16, 128, 1, 4), (16, 256, 1, 8)]
        middle = [(32, 128, 1, 4), (64, 128, 1, 4), (64, 256, 1, 8)]
        large += [(64, 256, 4, 8), (128, 128, 4, 8), (128, 256, 4, 8)]
    elif side.scale_bytes:
        small, middle = [(16, 128, 1, 4), (16, 128, 1, 8)], [(32, 128, 1, 8), (64, 128, 1, 4)]
    else:
        small, middle = [(16, 32, 1, 4), (16, 64, 1, 4), (16, 128, 1, 8)], [(32, 64, 1, 4), (64, 128, 1, 4)]
        large += [(64, 64, 1, 4)]
    chosen = small if s <= 16 else small + middle if s <= 64 else large
    return tuple(dict(zip(("block_m", "block_n", "walk", "warps"), config, strict=True)) for config in chosen)


def project(b: Buffers, block_m: int, block_n: int, walk: int, warps: int) -> None:
    from .triton_kernels import project_kernel

    grouped = bool(b.side.scale_bytes)
    project_kernel[(b.side.n // block_n, b.heads, -(-b.s // (block_m * walk)))](
        *(b.x, *b.x.stride()[:2], b.w, *b.w.stride()[:2], b.w_scale, *b.w_scale.stride(), *_rows(b.pe, b.x)),
        *(b.static_scale, b.out, *b.out.stride()[:2], b.out_group_scale, *b.out_group_scale.stride(), b.s),
        K=b.side.k,
        N=b.side.n,
        PE=b.side.rope,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        WALK=walk,
        STATIC=b.side.out_bytes == 1 and not grouped,
        GROUPED=grouped,
        num_warps=warps,
        num_stages=3 if b.side.k == GROUP else 2,  # four K blocks in three stages exceed shared memory
    )


def _rows(pe: Tensor | None, unread: Tensor) -> tuple[Tensor, int, int]:
    """q_pe and its strides, or what stands in the place of a tensor that is not there."""
    return (unread, 0, 0) if pe is None else (pe, pe.stride(0), pe.stride(1))


def rows_a_program(rows: int) -> int:
    """A power of 2: the device is busy at small S, a program's fixed cost small at large S."""
    wanted = max(1, rows // (SMS * PROGRAMS_AN_SM))
    return min(MAX_ROWS_A_PROGRAM, 1 << (wanted.bit_length() - 1))


def concat(b: Buffers, a: Tensor, out: Tensor) -> None:
    """a [S,H,n] and q_pe, where the side has it, side by side; in e4m3 with b.static_scale."""
    _move_rows(a, b.pe, b.static_scale, out)


def cast(b: Buffers) -> Tensor:
    """x in e4m3 with one static scale, head-major [H,S,k]."""
    out = b.scratch("cast", (b.heads, b.s, b.side.k), E4M3)
    _move_rows(b.x, None, b.static_scale, out.transpose(0, 1))
    return out


def head_major(b: Buffers) -> Tensor:
    """x as it is, [H,S,k] contiguous: a copy, unless it lies so already."""
    if b.x.transpose(0, 1).is_contiguous():
        return b.x.transpose(0, 1)
    out = b.scratch("head_major", (b.heads, b.s, b.side.k))
    _move_rows(b.x, None, b.static_scale, out.transpose(0, 1))
    return out


def _move_rows(a: Tensor, pe: Tensor | None, scale: Tensor, out: Tensor) -> None:
    from .triton_kernels import concat_kernel

    rows = a.shape[0] * a.shape[1]
    block = rows_a_program(rows)
    concat_kernel[(-(-rows // block),)](
        *(a, *a.stride()[:2], *_rows(pe, a), scale, out, *out.stride()[:2], rows, a.shape[1]),
        N=a.shape[2],
        PE=ROPE_DIM if pe is not None else 0,
        BLOCK=block,
        STATIC=out.dtype == E4M3,
    )


def group_quant(b: Buffers, x: Tensor, val: Tensor, scale: Tensor, m: int) -> None:
    """x [S,H,K] -> val [m,H,K] e4m3, scale [m,H,K/128] fp32; rows from S on are zero."""
    from .triton_kernels import group_quant_kernel

    rows, groups = m * b.heads, x.shape[2] // GROUP
    block = rows_a_program(rows * groups)
    group_quant_kernel[(-(-rows // block), groups)](
        *(x, *x.stride()[:2], val, *val.stride()[:2], scale, *scale.stride(), b.s, m, b.heads),
        BLOCK=block,
        HEAD_MAJOR=val.stride(0) < val.stride(1),
    )


def quantization_scratch(b: Buffers, head_major: bool) -> tuple[Tensor, Tensor]:
    """[H,M,K] and [H,M,K/128] as a masked GEMM reads them, or [S,H,K] and [S,H,K/128] for an
    einsum.

    In both the scales of consecutive tokens are neighbours.
    """
    groups = b.side.k // GROUP
    if head_major:
        val = b.scratch("q_val", (b.heads, b.m, b.side.k), E4M3)
        return val, b.scratch("q_scale", (b.heads, groups, b.m), FP32).transpose(1, 2)
    val = b.scratch("x_val", (b.s, b.heads, b.side.k), E4M3)
    return val, b.scratch("x_scale", (b.heads, groups, round_up(b.s, 4)), FP32)[..., : b.s].permute(2, 0, 1)


@dataclass(frozen=True)
class Shape:
    """Of the floor's launches."""

    warps: int
    tiles: int  # a program moves, reads and writes together
    stream: bool = False  # evict first

    def __str__(self) -> str:
        return f"{self.warps} warps, {self.tiles} tiles" + (", evict first" if self.stream else "")


SHAPES = [Shape(8, 4, True), Shape(8, 4), Shape(8, 2), Shape(8, 8), Shape(4, 4), Shape(4, 8)]


def shapes(quick: bool) -> dict[str, Shape]:
    return {str(shape): shape for shape in (SHAPES[:QUICK_SHAPES] if quick else SHAPES)}


def split(word_counts: tuple[int, int, int], shape: Shape) -> tuple[int, tuple[int, int, int]]:
    """Programs, and tiles of w, x and y for each of them: all together cover every word."""
    tile = WORDS_A_THREAD * WARP * shape.warps
    tiles = [-(-count // tile) for count in word_counts]
    programs = max(1, -(-sum(tiles) // shape.tiles))
    w, x, y = (-(-count // programs) for count in tiles)
    return max(-(-count // each) for count, each in zip(tiles, (w, x, y), strict=True) if each), (w, x, y)


def move(w: Tensor, x: Tensor, y: Tensor, counts: tuple[int, int, int], shape: Shape) -> None:
    """Reads counts[0] words of w and counts[1] of x, and writes counts[2] words of y."""
    from .triton_kernels import move_kernel

    programs, (w_tiles, x_tiles, y_tiles) = split(counts, shape)
    move_kernel[(programs,)](
        *(w, counts[0], x, counts[1], y, counts[2]),
        TILE=WORDS_A_THREAD * WARP * shape.warps,
        W_TILES=w_tiles,
        X_TILES=x_tiles,
        Y_TILES=y_tiles,
        STREAM=shape.stream,
        num_warps=shape.warps,
    )


def floor(b: Buffers, shape: Shape) -> None:
    """Moves one buffer set's bytes; a few KB of scales have no place behind the weights."""
    w, x, y = words(b.w), words(b.x_full), b.moved
    read, written = b.side.read_bytes(b.s, b.heads), b.side.written_bytes(b.s, b.heads)
    move(w, x, y, (min(b.side.weight_bytes(b.heads) // 4, w.numel()), read // 4, written // 4), shape)


def stream_ceiling(quick: bool) -> tuple[float, str]:
    """GB/s, read and written, of the fastest large copy: torch's or the floor's kernel."""
    count = CEILING_BYTES // 4
    source = torch.randint(0, 1 << 30, (count,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"torch copy": partial(target.copy_, source)}
    for name, shape in shapes(quick).items():
        calls[f"move_kernel, {name}"] = partial(move, source, source, target, (0, count, count), shape)
    captured = {name: timing.capture([call], 2) for name, call in calls.items()}
    samples = timing.interleave(captured, timing.TUNING_REPLAYS)
    timings = {name: timing.Timing.of(times) for name, times in samples.items()}
    name = min(timings, key=lambda name: timings[name].us)
    return 2 * CEILING_BYTES / timings[name].us / 1e3, name
