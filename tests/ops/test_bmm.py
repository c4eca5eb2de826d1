"""bmm is the reference's sum rounded once (a CPU's within an fp32 sum's error), and reads only what it should."""

import pytest
import torch
from cases import OPS, each_shape
from helpers import (
    E4M3,
    ROUNDING_FROBENIUS,
    ROW_LAYOUTS,
    SCALE_LAYOUTS,
    WEIGHT_LAYOUTS,
    assert_frobenius,
    assert_rounded,
    assert_same_bits,
    assert_untouched_outside,
    laid_out,
    rand,
    randn,
    random_weight,
    reference_product,
    strided,
)

from mla_fp8 import reference

bmm = OPS.bmm


def random_rows(rng, batch, m, k, device):
    """a [B,M,K] and a_scale [B,M,K/128]."""
    return reference.quantize(randn(rng, batch, m, k, device=device))


def assert_matches_reference(a, a_scale, b, b_scale, m=None, got=None):
    got = bmm(a, a_scale, b, b_scale, m=m) if got is None else got
    rows = slice(m)
    sums, error = reference_product(a[:, rows].transpose(0, 1), a_scale[:, rows].transpose(0, 1), b, b_scale)
    assert_rounded(got.transpose(0, 1), sums, error, lambda x: x.to(torch.bfloat16))
    assert_frobenius(got.transpose(0, 1), sums, ROUNDING_FROBENIUS)


@each_shape
def test_bmm_matches_reference(rng, device, s, h):
    assert_matches_reference(*random_rows(rng, h, s, 128, device), *random_weight(rng, h, 512, 128, device))


@pytest.mark.parametrize("n,k", [(128, 128), (128, 512), (256, 384), (384, 256), (128, 7168), (1024, 128)])
@pytest.mark.parametrize("m", [0, 1, 65])
def test_bmm_matches_reference_for_other_dims(rng, device, m, n, k):
    assert_matches_reference(*random_rows(rng, 2, m, k, device), *random_weight(rng, 2, n, k, device))


def test_bmm_result_is_contiguous_bf16(rng, device):
    c = bmm(*random_rows(rng, 3, 5, 128, device), *random_weight(rng, 3, 256, 128, device))
    assert c.shape == (3, 5, 256) and c.dtype == torch.bfloat16 and c.is_contiguous()


@pytest.mark.parametrize("m", [0, 1, 63, 64, 100])
def test_bmm_reads_only_m_rows(rng, device, m):
    a, a_scale = random_rows(rng, 3, 100, 256, device)
    weight = random_weight(rng, 3, 256, 256, device)
    want = bmm(a, a_scale, *weight)[:, :m].contiguous()
    a[:, m:] = float("nan")
    a_scale[:, m:] = float("nan")
    got = bmm(a, a_scale, *weight, m=m)
    assert got.is_contiguous()
    assert_same_bits(got, want)


def test_bmm_leaves_m_to_the_shape_of_a(rng, device):
    operands = *random_rows(rng, 2, 9, 128, device), *random_weight(rng, 2, 128, 128, device)
    assert_same_bits(bmm(*operands), bmm(*operands, m=9))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bmm_a_scale_that_is_not_finite_poisons_its_row_only(rng, device, value):
    a, a_scale = random_rows(rng, 2, 9, 256, device)
    weight = random_weight(rng, 2, 128, 256, device)
    clean = bmm(a, a_scale, *weight)
    a_scale[1, 4, 1] = value
    got = bmm(a, a_scale, *weight)
    assert not got[1, 4].isfinite().any()
    got[1, 4] = clean[1, 4]
    assert_same_bits(got, clean, "other rows")


def test_bmm_nan_in_a_poisons_its_row_only(rng, device):
    a, a_scale = random_rows(rng, 2, 9, 256, device)
    weight = random_weight(rng, 2, 128, 256, device)
    clean = bmm(a, a_scale, *weight)
    a[1, 4, 255] = float("nan")
    got = bmm(a, a_scale, *weight)
    assert got[1, 4].isnan().all()
    got[1, 4] = clean[1, 4]
    assert_same_bits(got, clean, "other rows")


def test_bmm_nan_in_b_poisons_its_column_only(rng, device):
    a, a_scale = random_rows(rng, 2, 9, 256, device)
    b, b_scale = random_weight(rng, 2, 128, 256, device)
    clean = bmm(a, a_scale, b, b_scale)
    b[1, 100, 3] = float("nan")
    got = bmm(a, a_scale, b, b_scale)
    assert got[1, :, 100].isnan().all()
    got[1, :, 100] = clean[1, :, 100]
    assert_same_bits(got, clean, "other columns")


def test_bmm_uses_the_scale_of_every_block(rng, device):
    a, a_scale = random_rows(rng, 2, 33, 384, device)
    b, b_scale = random_weight(rng, 2, 256, 384, device)
    a_scale *= 10 ** (rand(rng, *a_scale.shape, device=device) * 4 - 2)
    b_scale *= 10 ** (rand(rng, *b_scale.shape, device=device) * 4 - 2)
    assert_matches_reference(a, a_scale, b, b_scale)


def test_bmm_multiplies_every_pair_of_codes(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(E4M3)
    a = torch.zeros(1, 256, 128, dtype=E4M3, device=device)
    b = torch.zeros(1, 256, 128, dtype=E4M3, device=device)
    a[0, :, 17], b[0, :, 17] = codes, codes
    ones = torch.ones(1, 256, 1, device=device), torch.ones(1, 2, 1, device=device)
    want = (codes.double()[:, None] * codes.double()[None, :]).bfloat16()[None]
    got = bmm(a, ones[0], b, ones[1])
    fine = want.float() != 0  # a sum that starts at +0 may turn -0 into +0
    assert_same_bits(torch.where(fine, got, got.abs()), torch.where(fine, want, want.abs()))


def test_bmm_overflows_to_infinity(device):
    a = torch.full((1, 1, 128), 448.0, device=device).to(E4M3)
    b = torch.full((1, 128, 128), -448.0, device=device).to(E4M3)
    got = bmm(a, torch.full((1, 1, 1), 1e20, device=device), b, torch.full((1, 1, 1), 1e17, device=device))
    assert (got == float("-inf")).all()


@pytest.mark.parametrize("layout", ["first_columns", "last_columns", "transposed"])  # strides as for weights
def test_bmm_takes_strided_a(rng, device, layout):
    a, a_scale = random_rows(rng, 3, 65, 256, device)
    assert_matches_reference(laid_out(a, ROW_LAYOUTS[layout]), a_scale, *random_weight(rng, 3, 128, 256, device))


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_bmm_takes_strided_b(rng, device, layout):
    b, b_scale = random_weight(rng, 3, 256, 128, device)
    a = random_rows(rng, 3, 65, 128, device)
    assert_matches_reference(*a, laid_out(b, WEIGHT_LAYOUTS[layout]), b_scale)


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_bmm_takes_strided_scales(rng, device, layout):
    a, a_scale = random_rows(rng, 3, 65, 256, device)
    b, b_scale = random_weight(rng, 3, 256, 256, device)
    layout = SCALE_LAYOUTS[layout]
    assert_matches_reference(a, laid_out(a_scale, layout), b, laid_out(b_scale, layout))


def test_bmm_takes_expanded_operands(rng, device):
    a, a_scale = random_rows(rng, 1, 7, 128, device)
    b, b_scale = random_weight(rng, 1, 128, 128, device)
    scales = torch.full((1, 1, 1), 0.01, device=device).expand(3, 7, 1), b_scale.expand(3, 1, 1)
    assert_matches_reference(a.expand(3, 7, 128), scales[0], b.expand(3, 128, 128), scales[1])


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("m", [1, 65, 100])
def test_bmm_out_takes_strided_views(rng, device, layout, m):
    operands = *random_rows(rng, 3, 100, 128, device), *random_weight(rng, 3, 256, 128, device)
    c, buffer = strided((3, m, 256), *ROW_LAYOUTS[layout](3, m, 256), torch.bfloat16, device)
    bmm.out(*operands, m=m, c_out=c)
    assert_same_bits(c, bmm(*operands, m=m))
    assert_untouched_outside(buffer, c)
