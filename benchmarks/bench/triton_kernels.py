"""Triton kernels of the benchmark: the easy alternative (one fused kernel), the small kernels that
complete a baseline, and the floor's kernel, which moves bytes and computes nothing.

All read tensors with a contiguous last dim and any other strides; offsets are 64-bit.
"""
# mypy: ignore-errors
# ruff: noqa: N803  (compile-time constants are upper case)

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
AMAX_FLOOR = tl.constexpr(1e-4)


@triton.jit
def _to_fp8(x, inverse_scale):
    return tl.minimum(tl.maximum(x * inverse_scale, -FP8_MAX), FP8_MAX).to(tl.float8e4nv)


@triton.jit
def _group_scale(x):
    """[rows, 128] -> [rows]: amax / 448, as DeepGEMM's per-token cast."""
    return tl.maximum(tl.max(tl.abs(x), axis=1), AMAX_FLOOR) / FP8_MAX


@triton.jit
def project_kernel(
    x, x_ss, x_sh,  # [S,H,K] bf16
    w, w_sh, w_sn,  # [H,N,K] e4m3
    w_scale, ws_sh, ws_sn, ws_sk,  # [H,N/128,K/128] fp32
    pe, pe_ss, pe_sh,  # [S,H,PE] bf16
    out_scale,  # one fp32
    out, out_ss, out_sh,  # [S,H,N+PE]
    group_scale, gs_ss, gs_sh,  # [S,H] fp32
    s,
    K: tl.constexpr, N: tl.constexpr, PE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WALK: tl.constexpr, STATIC: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """out[s,h,:N] = quant(x[s,h,:]) · w[h]ᵀ, out[s,h,N:] = pe[s,h,:].

    A program makes WALK tiles of [BLOCK_M, BLOCK_N] of one head; with K = 128 it holds its weights
    meanwhile.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, 128)
    weights = w + h * w_sh + columns[:, None] * w_sn + k[None, :]
    weight_scales = w_scale + h * ws_sh + (columns // 128) * ws_sn
    weight = tl.load(weights)
    weight_scale = tl.load(weight_scales)
    for tile in range(WALK):
        rows = ((tl.program_id(2) * WALK + tile) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (rows < s)[:, None]
        source = x + rows[:, None] * x_ss + h * x_sh + k[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for block in tl.static_range(K // 128):
            a = tl.load(source + block * 128, mask=inside, other=0.0).to(tl.float32)
            if K > 128:
                weight = tl.load(weights + block * 128)
                weight_scale = tl.load(weight_scales + block * ws_sk)
            a_scale = _group_scale(a)
            product = tl.dot(_to_fp8(a, (1.0 / a_scale)[:, None]), tl.trans(weight))
            acc += product * (a_scale[:, None] * weight_scale[None, :])
        target = out + rows[:, None] * out_ss + h * out_sh
        if GROUPED:
            scale = _group_scale(acc)
            tl.store(target + columns[None, :], _to_fp8(acc, (1.0 / scale)[:, None]), mask=inside)
            tl.store(group_scale + rows * gs_ss + h * gs_sh, scale, mask=rows < s)
        elif STATIC:
            tl.store(target + columns[None, :], _to_fp8(acc, 1.0 / tl.load(out_scale)), mask=inside)
        else:
            tl.store(target + columns[None, :], acc.to(out.dtype.element_ty), mask=inside)
        if PE > 0 and tl.program_id(0) == 0:
            p = tl.arange(0, PE)
            rope = tl.load(pe + rows[:, None] * pe_ss + h * pe_sh + p[None, :], mask=inside, other=0.0)
            if STATIC:
                rope = _to_fp8(rope.to(tl.float32), 1.0 / tl.load(out_scale))
            tl.store(target + N + p[None, :], rope, mask=inside)


@triton.jit
def concat_kernel(
    a, a_ss, a_sh,  # [S,H,N] bf16
    pe, pe_ss, pe_sh,  # [S,H,PE] bf16
    out_scale,  # one fp32
    out, out_ss, out_sh,  # [S,H,N+PE] bf16, or e4m3 if STATIC
    rows, heads,
    N: tl.constexpr, PE: tl.constexpr, BLOCK: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """out[s,h,:] = a[s,h,:] ++ pe[s,h,:]; STATIC: e4m3, divided by out_scale. PE = 0: a cast."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = row // heads
    h = row % heads
    inside = (row < rows)[:, None]
    n = tl.arange(0, N)
    value = tl.load(a + (s * a_ss + h * a_sh)[:, None] + n[None, :], mask=inside)
    target = out + (s * out_ss + h * out_sh)[:, None]
    if PE > 0:
        p = tl.arange(0, PE)
        rope = tl.load(pe + (s * pe_ss + h * pe_sh)[:, None] + p[None, :], mask=inside)
        if STATIC:
            rope = _to_fp8(rope.to(tl.float32), 1.0 / tl.load(out_scale))
        tl.store(target + N + p[None, :], rope, mask=inside)
    if STATIC:
        value = _to_fp8(value.to(tl.float32), 1.0 / tl.load(out_scale))
    tl.store(target + n[None, :], value, mask=inside)


@triton.jit
def group_quant_kernel(
    x, x_ss, x_sh,  # [S,H,K] bf16
    val, val_ss, val_sh,  # [M,H,K] e4m3 in any order of the first two dims
    scale, scale_ss, scale_sh, scale_sk,  # [M,H,K/128] fp32
    s, m, heads,
    BLOCK: tl.constexpr, HEAD_MAJOR: tl.constexpr,
):  # fmt: skip
    """1x128 groups; rows s..m-1 become 0. HEAD_MAJOR: consecutive rows are tokens of one head."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if HEAD_MAJOR:
        t = row % m
        h = row // m
    else:
        t = row // heads
        h = row % heads
    k = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = row < m * heads
    data = tl.load(x + (t * x_ss + h * x_sh)[:, None] + k[None, :], mask=(inside & (t < s))[:, None], other=0.0)
    data = data.to(tl.float32)
    data_scale = _group_scale(data)
    tl.store(
        val + (t * val_ss + h * val_sh)[:, None] + k[None, :],
        _to_fp8(data, (1.0 / data_scale)[:, None]),
        mask=inside[:, None],
    )
    data_scale = tl.where(t < s, data_scale, 0.0)
    tl.store(scale + t * scale_ss + h * scale_sh + tl.program_id(1) * scale_sk, data_scale, mask=inside)


@triton.jit
def move_kernel(
    w, w_words, x, x_words, y, y_words,
    TILE: tl.constexpr, W_TILES: tl.constexpr, X_TILES: tl.constexpr, Y_TILES: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Reads w and x and writes y, in words of 4 bytes; a program W_TILES and X_TILES tiles in, then
    Y_TILES tiles out.

    All its reads are issued before the first use; what it writes is their xor, so that no read can
    be dropped.
    """
    p = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    policy: tl.constexpr = "evict_first" if STREAM else ""
    cache: tl.constexpr = ".cs" if STREAM else ""
    acc = tl.zeros((TILE,), dtype=tl.int32)
    for i in tl.static_range(W_TILES):
        at = (p * W_TILES + i) * TILE + lane
        acc ^= tl.load(w + at, mask=at < w_words, other=0, eviction_policy=policy)
    for i in tl.static_range(X_TILES):
        at = (p * X_TILES + i) * TILE + lane
        acc ^= tl.load(x + at, mask=at < x_words, other=0, eviction_policy=policy)
    for i in tl.static_range(Y_TILES):
        at = (p * Y_TILES + i) * TILE + lane
        tl.store(y + at, acc, mask=at < y_words, cache_modifier=cache)


@triton.jit
def row_quant_kernel(
    x, x_sh, x_ss,  # [H,S,K] bf16
    val, val_sh, val_ss,  # [H,M,K] e4m3
    scale, scale_sh, scale_ss, scale_sk,  # [H,M,K/128] fp32
    counts,  # int32 [H]
    eps,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """A program a row of one head, its groups in turn, by division; the first counts the rows."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    if t == 0:
        tl.store(counts + h, tl.num_programs(0))
    for group in range(GROUPS):
        k = group * 128 + tl.arange(0, 128)
        data = tl.load(x + h * x_sh + t * x_ss + k).to(tl.float32)
        data_scale = tl.maximum(tl.max(tl.abs(data)), eps) / FP8_MAX
        quantized = tl.minimum(tl.maximum(data / data_scale, -FP8_MAX), FP8_MAX).to(tl.float8e4nv)
        tl.store(val + h * val_sh + t * val_ss + k, quantized)
        tl.store(scale + h * scale_sh + t * scale_ss + group * scale_sk, data_scale)
