"""Launches of triton_kernels.py on buffer sets."""

import functools
from typing import Any

from buffers import E4M3, FP32, Buffers
from sides import ROPE_DIM, Side
from torch import Tensor

from mla_fp8.formats import GROUP


@functools.cache
def has_triton() -> str:
    """Empty, or why Triton's kernels cannot run."""
    try:
        import triton_kernels  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def triton_configs(side: Side, s: int) -> tuple[dict[str, Any], ...]:
    """block_m, block_n, walk, warps."""
    if side.name == "front512" or side.rope:
        small, middle = (
            [(16, 64, 1, 4), (16, 128, 1, 4), (16, 256, 1, 8)],
            [(32, 128, 1, 4), (64, 128, 1, 4), (64, 256, 1, 8)],
        )
        large = [
            (64, 128, 1, 4),
            (64, 128, 4, 4),
            (64, 256, 4, 8),
            (128, 128, 1, 8),
            (128, 128, 4, 8),
            (128, 256, 4, 8),
        ]
    elif side.scale_bytes:
        small, middle = [(16, 128, 1, 4), (16, 128, 1, 8)], [(32, 128, 1, 8), (64, 128, 1, 4)]
        large = [(64, 128, 1, 4), (64, 128, 4, 4), (128, 128, 1, 8)]
    else:
        small, middle = [(16, 32, 1, 4), (16, 64, 1, 4), (16, 128, 1, 8)], [(32, 64, 1, 4), (64, 128, 1, 4)]
        large = [(64, 128, 1, 4), (64, 128, 4, 4), (128, 128, 1, 8), (64, 64, 1, 4)]
    chosen = small if s <= 16 else small + middle if s <= 64 else large
    return tuple(dict(zip(("block_m", "block_n", "walk", "warps"), config, strict=True)) for config in chosen)


def project(b: Buffers, block_m: int, block_n: int, walk: int, warps: int) -> None:
    from triton_kernels import project_kernel

    pe, grouped = b.pe, bool(b.side.scale_bytes)
    project_kernel[(b.side.n // block_n, b.heads, -(-b.s // (block_m * walk)))](
        *(b.x, *b.x.stride()[:2], b.w, *b.w.stride()[:2], b.w_scale, *b.w_scale.stride()),
        *((pe, *pe.stride()[:2]) if pe is not None else (b.x, 0, 0)),
        *(b.out_scale, b.out, *b.out.stride()[:2], b.out_group_scale, *b.out_group_scale.stride(), b.s),
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


SMS = 132
PROGRAMS_AN_SM = 8
MAX_ROWS_A_PROGRAM = 16


def rows_a_program(rows: int) -> int:
    """A power of 2 that keeps the device busy at small S and a program's fixed cost small at large S."""
    wanted = max(1, rows // (SMS * PROGRAMS_AN_SM))
    return min(MAX_ROWS_A_PROGRAM, 1 << (wanted.bit_length() - 1))


def concat(b: Buffers, a: Tensor, out: Tensor) -> None:
    """a [S,H,n] and q_pe, if the side has one, beside each other; to e4m3 with b.out_scale if out is."""
    move_rows(a, b.pe, b.out_scale, out)


def cast(b: Buffers) -> Tensor:
    """x in e4m3 with one static scale, head-major [H,S,k]."""
    out = b.scratch("cast", (b.heads, b.s, b.side.k), E4M3)
    move_rows(b.x, None, b.x_scale, out.transpose(0, 1))
    return out


def move_rows(a: Tensor, pe: Tensor | None, scale: Tensor, out: Tensor) -> None:
    from triton_kernels import concat_kernel

    rows, block = a.shape[0] * a.shape[1], rows_a_program(a.shape[0] * a.shape[1])
    concat_kernel[(-(-rows // block),)](
        *(
            a,
            *a.stride()[:2],
            *((pe, *pe.stride()[:2]) if pe is not None else (a, 0, 0)),
            scale,
            out,
            *out.stride()[:2],
        ),
        *(rows, a.shape[1]),
        N=a.shape[2],
        PE=ROPE_DIM if pe is not None else 0,
        BLOCK=block,
        STATIC=out.dtype == E4M3,
    )


def group_quant(b: Buffers, x: Tensor, val: Tensor, scale: Tensor, m: int) -> None:
    """x [S,H,K] -> val [m,H,K] e4m3, scale [m,H,K/128] fp32 in 1x128 groups; rows from S on are zero."""
    from triton_kernels import group_quant_kernel

    rows, head_major = m * b.heads, val.stride(0) < val.stride(1)
    block = rows_a_program(rows * (x.shape[2] // GROUP))
    group_quant_kernel[(-(-rows // block), x.shape[2] // GROUP)](
        *(x, *x.stride()[:2], val, *val.stride()[:2], scale, *scale.stride(), b.s, m, b.heads),
        BLOCK=block,
        HEAD_MAJOR=head_major,
    )


def quantization_scratch(b: Buffers, head_major: bool) -> tuple[Tensor, Tensor]:
    """[H,M,K] and [H,M,K/128] as a masked GEMM reads them, or [S,H,K] and [S,H,K/128] for an einsum; in both the scales
    of consecutive tokens are neighbours."""
    groups = b.side.k // GROUP
    if head_major:
        val = b.scratch("q_val", (b.heads, b.m, b.side.k), E4M3)
        return val, b.scratch("q_scale", (b.heads, groups, b.m), FP32).transpose(1, 2)
    val = b.scratch("x_val", (b.s, b.heads, b.side.k), E4M3)
    aligned = -(-b.s // 4) * 4
    return val, b.scratch("x_scale", (b.heads, groups, aligned), FP32)[..., : b.s].permute(2, 0, 1)
