"""Exact activations on a CPU: an fp32 sum of exact products, within a derived bound, on each instruction set."""

import pytest
import torch
from cases import OPS
from helpers import E4M3, assert_rounded, assert_same_bits, randn, random_weight

from mla_fp8 import reference

# N and K of DeepSeek-V3's products, and a K that is taken block by block where there are many rows.
EXTENTS = {"absorb_q": (512, 128), "v_up": (128, 512)}
LONG_K = 640
ROUNDED_OVER = 1.02  # relative error over that of rounding the exact result
S, H = 64, 4  # 131,072 results of absorb_q: with fewer the ratio scatters

HALF_ULP = 2.0**-24
BLOCK_ROUNDINGS = 129  # of a sum of 128 products, 127 at most, of a_scale * w_scale, and of the fma
# What AMX drops of a product: a value below 2^-126, as a subnormal, times 448 at most. In units of the group's scale.
DROPPED = 2.0**-117
SCALE_WINDOW = 2.0**32  # the scale is 1 for a group's amax in [1 / window, 2 window), and amax * window at most below

op_and_dtype = pytest.mark.parametrize(
    "op,dtype", [(op, dtype) for op in EXTENTS for dtype in (torch.bfloat16, torch.float16)], ids=str
)


def outlier(rng, x, factor):
    column = int(torch.randint(0, x.shape[-1], (), generator=rng))
    x[..., column] *= factor
    return x


DATA = {
    "normal": lambda rng, x: x,
    "outlier_30": lambda rng, x: outlier(rng, x, 30),
    "outlier_1000": lambda rng, x: outlier(rng, x, 1000),
    "heavy_tailed": lambda rng, x: x * torch.exp(1.5 * randn(rng, *x.shape)),
    "cubed": lambda rng, x: x**3,
    "positive": lambda rng, x: x.abs(),
    "per_row": lambda rng, x: x * torch.exp(2 * randn(rng, *x.shape[:-1], 1)),
}


def exact_product(x, weight, scale):
    """In fp64: the sums, and how far an fp32 sum may be off."""
    dense = reference.dequantize_blocks(weight, scale)
    rows = x.double().masked_fill(~x.isfinite().all(-1, keepdim=True), torch.nan)
    magnitude = torch.einsum("shk,hnk->shn", rows.abs(), dense.abs())
    blocks = x.shape[-1] // 128
    amax = x.double().abs().unflatten(-1, (blocks, 128)).amax(-1)
    group_scale = (amax * SCALE_WINDOW).clamp(max=1).maximum(amax / SCALE_WINDOW)
    block_scale = scale.double().abs().repeat_interleave(128, -2)
    dropped = torch.einsum("shp,hnp->shn", group_scale, block_scale) * 128 * DROPPED
    return torch.einsum("shk,hnk->shn", rows, dense), magnitude * (BLOCK_ROUNDINGS + blocks) * HALF_ULP + dropped


def assert_within_bound(op, x, weight, scale):
    exact, error = exact_product(x, weight, scale)
    assert_rounded(getattr(OPS, op)(x, weight, scale), exact, error, lambda value: value.to(x.dtype))


@pytest.mark.parametrize("kind", DATA)
@op_and_dtype
def test_exact_error_is_that_of_rounding(rng, op, dtype, kind):
    n, k = EXTENTS[op]
    x = DATA[kind](rng, randn(rng, S, H, k)).to(dtype)
    weight, scale = random_weight(rng, H, n, k)
    exact, _ = exact_product(x, weight, scale)
    error = (getattr(OPS, op)(x, weight, scale).double() - exact).norm()
    assert error <= ROUNDED_OVER * (exact.to(dtype).double() - exact).norm()


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("s", [1, 17, 140])
@op_and_dtype
def test_exact_is_within_an_fp32_sum(rng, op, dtype, kind, s):
    n, k = EXTENTS[op]
    assert_within_bound(op, DATA[kind](rng, randn(rng, s, 2, k)).to(dtype), *random_weight(rng, 2, n, k))


@pytest.mark.parametrize("s,k", [(1, 128), (3, LONG_K), (33, 1536), (140, LONG_K), (300, 384)])
def test_exact_is_within_an_fp32_sum_for_other_extents(rng, dtype, s, k):
    assert_within_bound("v_up", randn(rng, s, 2, k).to(dtype), *random_weight(rng, 2, 384, k))


# Values of the activations, and of the scales, that reach the ends of fp32 only together.
ENDS = {
    "subnormal": (2.0**-130, 1.0),
    "subnormal_by_large_scales": (2.0**-130, 2.0**120),
    "least_normal": (2.0**-126, 1.0),
    "tiny_by_small_scales": (2.0**-60, 2.0**-60),
    "huge_by_small_scales": (2.0**125, 2.0**-40),
    "huge_by_subnormal_scales": (2.0**125, 2.0**-134),
    "one_by_large_scales": (1.0, 2.0**110),
    "one_by_subnormal_scales": (1.0, 2.0**-128),
}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("op", EXTENTS)
def test_exact_reaches_the_ends_of_the_range(rng, op, ends):
    """No step on the way overflows or loses a subnormal where the result is a bf16."""
    n, k = EXTENTS[op]
    size, scale_size = ENDS[ends]
    x = (randn(rng, 20, 2, k).clamp(-2, 2).double() * size).bfloat16()
    weight, scale = random_weight(rng, 2, n, k)
    scale = (scale.double() * scale_size).float()
    assert_within_bound(op, x, weight, scale)
    exact, _ = exact_product(x, weight, scale)
    assert 0 < exact.abs().max() < torch.finfo(torch.bfloat16).max


@pytest.mark.parametrize("op", EXTENTS)
def test_exact_counts_small_values_beside_large_ones(rng, op):
    """2^-60 counts beside 2^30, which meets zero weights."""
    n, k = EXTENTS[op]
    x = randn(rng, 20, 2, k) * 2.0**-60
    x[..., 5] = 2.0**30
    weight, scale = random_weight(rng, 2, n, k)
    weight.view(torch.uint8)[..., 5] = 0
    assert_within_bound(op, x.bfloat16(), weight, scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 200, 511])
def test_exact_nan_and_inf_make_their_own_row_nan(rng, dtype, bad, column):
    x = randn(rng, 20, 3, 512).to(dtype)
    weight = random_weight(rng, 3, 128, 512)
    results = lambda x: (OPS.v_up(x, *weight), *OPS.v_up_quantized(x, *weight))  # noqa: E731
    before = results(x)
    x[7, 1, column] = bad
    for got, want in zip(results(x), before, strict=True):
        got, want = (result.reshape(20, 3, -1).float() for result in (got, want))
        assert got[7, 1].isnan().all()
        want[7, 1] = torch.nan
        assert_same_bits(got, want)


def test_exact_nan_weight_makes_its_own_column_nan(rng, dtype):
    x = randn(rng, 20, 2, 512).to(dtype)
    weight, scale = random_weight(rng, 2, 128, 512)
    before = OPS.v_up(x, weight, scale)
    for sign, column in ((0x7F, 3), (0xFF, 90)):
        weight.view(torch.uint8)[1, column, 300] = sign
        before[:, 1, column] = torch.nan
    assert_same_bits(OPS.v_up(x, weight, scale), before)


def test_exact_takes_every_weight(dtype):
    """All codes of e4m3, subnormals too, each alone in its column."""
    codes = torch.arange(256, dtype=torch.uint8)
    weight = torch.zeros(1, 256, 128, dtype=torch.uint8)
    weight[0, torch.arange(256), torch.arange(256) % 128] = codes
    weight = weight.view(E4M3)
    x = torch.full((3, 1, 128), 1.0, dtype=dtype)
    want = codes.view(E4M3).to(dtype).expand(3, 1, 256)
    assert torch.equal(OPS.v_up(x, weight, torch.ones(1, 2, 1)).nan_to_num(7), want.nan_to_num(7))


def test_exact_takes_every_activation(dtype):
    """All finite values, alone in their row: times 1 they come back, times 1.5 rounded once."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    x = torch.zeros(len(values), 1, 128, dtype=dtype)
    x[:, 0, 77] = values
    weight = torch.tensor([1.0, 1.5]).repeat_interleave(64).view(1, 128, 1).expand(1, 128, 128).to(E4M3)
    got = OPS.v_up(x, weight.contiguous(), torch.ones(1, 1, 1))[:, 0]
    want = (values.double()[:, None] * torch.tensor([1.0, 1.5], dtype=torch.float64)).to(dtype)
    assert torch.equal(got[:, [0, 127]], want)


@pytest.mark.parametrize("s", [1, 2, 16, 17, 131])
@pytest.mark.parametrize("k", [128, 512, LONG_K])
def test_exact_bits_do_not_depend_on_the_other_tokens(rng, dtype, s, k):
    """Neither where all of K is kept at once nor where it is taken block by block."""
    x = randn(rng, 140, 2, k).to(dtype)
    weight = random_weight(rng, 2, 128, k)
    assert_same_bits(OPS.v_up(x[-s:], *weight), OPS.v_up(x, *weight)[-s:])
