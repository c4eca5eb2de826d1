"""v_up is the reference's sum rounded once (a CPU's within an fp32 sum's error), and writes any strides in place."""

import pytest
import torch
from cases import ACTIVATIONS, OPS, each_activations, each_shape, each_shape_and_activations
from helpers import (
    CALC_DIFF,
    E4M3,
    EXACT_FROBENIUS,
    FP8_FROBENIUS,
    FP8_TWICE_FROBENIUS,
    ROUNDING_FROBENIUS,
    ROW_LAYOUTS,
    SCALE_LAYOUTS,
    WEIGHT_LAYOUTS,
    assert_frobenius,
    assert_rounded,
    assert_same_bits,
    assert_untouched_outside,
    calc_diff,
    laid_out,
    rand,
    randn,
    random_weight,
    reference_product,
    strided,
)

from mla_fp8 import reference

v_up = OPS.v_up


def assert_matches_reference(o_latent, weight, out_scale=None, activations="exact"):
    got = v_up(o_latent, *weight, out_scale, **ACTIVATIONS[activations])
    sums, error = reference_product(*reference.keep_or_quantize(o_latent, activations), *weight)
    if out_scale is None:
        assert_rounded(got, sums, error, lambda x: x.to(o_latent.dtype))
    else:
        assert_rounded(got, sums, error, lambda x: reference.to_fp8(x, out_scale))
    return got, sums


@each_shape_and_activations
def test_v_up_matches_reference(rng, device, dtype, s, h, activations):
    o_latent = randn(rng, s, h, 512, dtype=dtype, device=device)
    weight = random_weight(rng, h, 128, 512, device)
    got, sums = assert_matches_reference(o_latent, weight, activations=activations)
    assert_frobenius(got, sums, ROUNDING_FROBENIUS)


@pytest.mark.parametrize("s,h", [(0, 2), (1, 1), (1, 3), (7, 16), (64, 2), (257, 2)])
def test_v_up_fp8_matches_reference(rng, device, dtype, s, h):
    o_latent = randn(rng, s, h, 512, dtype=dtype, device=device)
    weight = random_weight(rng, h, 128, 512, device)
    assert_matches_reference(o_latent, weight, torch.tensor([0.006], device=device))


@pytest.mark.parametrize("r,v", [(128, 128), (256, 128), (384, 256), (512, 384), (7168, 128)])
@pytest.mark.parametrize("s", [0, 1, 65])
def test_v_up_matches_reference_for_other_dims(rng, device, s, r, v):
    o_latent = randn(rng, s, 2, r, dtype=torch.bfloat16, device=device)
    assert_matches_reference(o_latent, random_weight(rng, 2, v, r, device))


def test_v_up_result_is_contiguous(rng, device, dtype):
    v = v_up(randn(rng, 5, 3, 512, dtype=dtype, device=device), *random_weight(rng, 3, 256, 512, device))
    assert v.shape == (5, 3, 256) and v.dtype == dtype and v.is_contiguous()


@each_shape
def test_v_up_has_the_bits_of_bmm(rng, device, s, h):
    o_latent = randn(rng, s, h, 512, dtype=torch.bfloat16, device=device)
    weight = random_weight(rng, h, 128, 512, device)
    want = OPS.bmm(*OPS.quantize_q_nope(o_latent), *weight, m=s).transpose(0, 1)
    assert_same_bits(v_up(o_latent, *weight, fp8_activations=True), want)


@each_activations
@pytest.mark.parametrize("fp8", [False, True])
def test_v_up_is_near_exact_arithmetic(rng, device, dtype, fp8, activations):
    o_latent = randn(rng, 64, 8, 512, dtype=dtype, device=device)
    weight = random_weight(rng, 8, 128, 512, device)
    want = torch.einsum("shr,hvr->shv", o_latent.double(), reference.dequantize_blocks(*weight))
    if fp8:
        out_scale = torch.tensor([0.04], device=device)
        got = v_up(o_latent, *weight, out_scale, **ACTIVATIONS[activations]).double() * out_scale.double()
    else:
        got = v_up(o_latent, *weight, **ACTIVATIONS[activations])
    bounds = (EXACT_FROBENIUS[dtype], FP8_FROBENIUS, FP8_TWICE_FROBENIUS)  # by how many of the two are FP8
    assert_frobenius(got, want, bounds[fp8 + (activations == "fp8")])
    assert calc_diff(got, want) < CALC_DIFF


@each_activations
def test_v_up_scales_every_group_by_itself(rng, device, dtype, activations):
    o_latent = randn(rng, 33, 3, 512, dtype=dtype, device=device)
    o_latent *= (10 ** (rand(rng, 33, 3, 4, device=device) * 3 - 2)).repeat_interleave(128, -1).to(dtype)
    w_uv, w_uv_scale = random_weight(rng, 3, 256, 512, device)
    weight = w_uv, w_uv_scale * 10 ** (rand(rng, 3, 2, 4, device=device) * 3 - 2)
    assert_matches_reference(o_latent, weight, activations=activations)


@each_activations
@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-7, 3e-5, 6e4])
def test_v_up_matches_reference_at_any_magnitude(rng, device, dtype, magnitude, activations):
    o_latent = ((rand(rng, 17, 2, 512) * 2 - 1) * magnitude).to(device, dtype)
    assert_matches_reference(o_latent, random_weight(rng, 2, 128, 512, device), activations=activations)


@each_activations
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_v_up_row_that_is_not_finite_poisons_itself_only(rng, device, dtype, value, fp8, activations):
    clean = randn(rng, 9, 3, 512, dtype=dtype, device=device)
    weight = random_weight(rng, 3, 128, 512, device)
    dirty = clean.clone()
    dirty[4, 1, 300] = value
    out_scale = torch.tensor([0.01], device=device) if fp8 else None
    got, want = (v_up(o, *weight, out_scale, **ACTIVATIONS[activations]) for o in (dirty, clean))
    assert got[4, 1].float().isnan().all()
    got[4, 1] = want[4, 1]
    assert_same_bits(got, want, "other rows")


def test_v_up_nan_weight_poisons_its_column_only(rng, device, dtype):
    o_latent = randn(rng, 9, 3, 512, dtype=dtype, device=device)
    w_uv, w_uv_scale = random_weight(rng, 3, 128, 512, device)
    want = v_up(o_latent, w_uv, w_uv_scale)
    w_uv.view(torch.uint8)[1, 100, 500] = 0xFF
    got = v_up(o_latent, w_uv, w_uv_scale)
    assert got[:, 1, 100].isnan().all()
    got[:, 1, 100] = want[:, 1, 100]
    assert_same_bits(got, want, "other columns")


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("s", [1, 65])
def test_v_up_takes_strided_input(rng, device, dtype, layout, s):
    o_latent = randn(rng, s, 3, 512, dtype=dtype, device=device)
    weight = random_weight(rng, 3, 128, 512, device)
    assert_same_bits(v_up(laid_out(o_latent, ROW_LAYOUTS[layout]), *weight), v_up(o_latent, *weight))


def test_v_up_takes_the_checkpoint_view(rng, device, dtype):
    kv_b_proj, scale = random_weight(rng, 1, 16 * 256, 512, device)
    w_uv, w_uv_scale = kv_b_proj.view(16, 256, 512)[:, 128:], scale.view(16, 2, 4)[:, 1:]
    assert w_uv.stride(0) == 131072
    o_latent = randn(rng, 5, 16, 512, dtype=dtype, device=device)
    want = v_up(o_latent, w_uv.contiguous(), w_uv_scale.contiguous())
    assert_same_bits(v_up(o_latent, w_uv, w_uv_scale), want)


@pytest.mark.parametrize("scale_layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_v_up_takes_strided_weight_and_scale(rng, device, layout, scale_layout):
    o_latent = randn(rng, 17, 3, 256, dtype=torch.bfloat16, device=device)
    w_uv, w_uv_scale = random_weight(rng, 3, 256, 256, device)
    views = laid_out(w_uv, WEIGHT_LAYOUTS[layout]), laid_out(w_uv_scale, SCALE_LAYOUTS[scale_layout])
    assert_same_bits(v_up(o_latent, *views), v_up(o_latent, w_uv, w_uv_scale))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("s", [0, 1, 65])
def test_v_up_out_takes_strided_views(rng, device, dtype, s, layout, fp8):
    o_latent = randn(rng, s, 3, 512, dtype=dtype, device=device)
    weight = random_weight(rng, 3, 128, 512, device)
    out_scale = torch.tensor([0.01], device=device) if fp8 else None
    v, buffer = strided((s, 3, 128), *ROW_LAYOUTS[layout](s, 3, 128), E4M3 if fp8 else dtype, device)
    v_up.out(o_latent, *weight, out_scale, v_out=v)
    assert_same_bits(v, v_up(o_latent, *weight, out_scale))
    assert_untouched_outside(buffer, v)
