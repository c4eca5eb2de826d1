"""v_up_quantized rounds once, from the fp32 product, with one scale a (token, head)."""

import pytest
import torch
from cases import ACTIVATIONS, OPS, each_activations, each_shape_and_activations
from helpers import (
    CALC_DIFF,
    E4M3,
    FP8_FROBENIUS,
    FP8_TWICE_FROBENIUS,
    ROW_LAYOUTS,
    assert_frobenius,
    assert_rounded,
    assert_same_bits,
    assert_untouched_outside,
    calc_diff,
    laid_out,
    randn,
    random_weight,
    reference_product,
    strided,
)

from mla_fp8 import reference

v_up_quantized = OPS.v_up_quantized


def assert_matches_reference(o_latent, weight, activations="exact"):
    s, h, _ = o_latent.shape
    val, scale = v_up_quantized(o_latent, *weight, **ACTIVATIONS[activations])
    sums, error = reference_product(*reference.keep_or_quantize(o_latent, activations), *weight)
    amax, amax_error = sums.abs().amax(-1), error.amax(-1)

    def scale_of(amax):
        amax = torch.maximum(amax.float(), torch.tensor(reference.AMAX_FLOOR, device=amax.device))
        return amax / torch.full_like(amax, 448.0)

    assert_rounded(scale, amax, amax_error, scale_of, "v_scale")
    rounding = lambda x: reference.to_fp8(x, scale.unsqueeze(-1))  # noqa: E731  by the scale that was returned
    assert_rounded(val.view(s, h, 128), sums, error, rounding, "v_val")


@each_shape_and_activations
def test_v_up_quantized_matches_reference(rng, device, dtype, s, h, activations):
    o_latent = randn(rng, s, h, 512, dtype=dtype, device=device)
    assert_matches_reference(o_latent, random_weight(rng, h, 128, 512, device), activations)


@pytest.mark.parametrize("r", [128, 256, 384, 7168])
def test_v_up_quantized_matches_reference_for_other_dims(rng, device, r):
    o_latent = randn(rng, 65, 2, r, dtype=torch.bfloat16, device=device)
    assert_matches_reference(o_latent, random_weight(rng, 2, 128, r, device))


@pytest.mark.parametrize("s,h", [(1, 1), (1, 3), (4, 1), (5, 1), (5, 16), (257, 2)])
def test_v_up_quantized_strides_are_as_documented(rng, device, dtype, s, h):
    val, scale = v_up_quantized(
        randn(rng, s, h, 512, dtype=dtype, device=device), *random_weight(rng, h, 128, 512, device)
    )
    assert val.shape == (s, h * 128) and val.dtype == E4M3 and val.stride() == (h * 128, 1)
    assert scale.shape == (s, h) and scale.dtype == torch.float32 and scale.stride() == (1, -(-s // 4) * 4)


@each_activations
def test_v_up_quantized_is_near_exact_arithmetic(rng, device, dtype, activations):
    o_latent = randn(rng, 64, 8, 512, dtype=dtype, device=device)
    weight = random_weight(rng, 8, 128, 512, device)
    want = torch.einsum("shr,hvr->shv", o_latent.double(), reference.dequantize_blocks(*weight))
    val, scale = v_up_quantized(o_latent, *weight, **ACTIVATIONS[activations])
    got = val.double().view(64, 8, 128) * scale.double().unsqueeze(-1)
    assert_frobenius(got, want, FP8_FROBENIUS if activations == "exact" else FP8_TWICE_FROBENIUS)
    assert calc_diff(got, want) < CALC_DIFF


def test_v_up_quantized_does_not_round_to_the_input_dtype_first(rng, device):
    """A scale is amax / 448 of fp32 values: almost none of them is 1/448 of a bf16 value."""
    o_latent = randn(rng, 64, 8, 512, dtype=torch.bfloat16, device=device)
    _, scale = v_up_quantized(o_latent, *random_weight(rng, 8, 128, 512, device))
    amax = scale.double() * 448
    from_bf16 = (amax - amax.to(torch.bfloat16).double()).abs() <= amax * 2.0**-23
    assert from_bf16.float().mean() < 0.1


def test_v_up_quantized_scale_of_a_zero_row_is_the_floor(rng, device, dtype):
    o_latent = torch.zeros(3, 2, 512, dtype=dtype, device=device)
    val, scale = v_up_quantized(o_latent, *random_weight(rng, 2, 128, 512, device))
    floor = torch.full_like(scale, reference.AMAX_FLOOR)
    assert_same_bits(scale, floor / torch.full_like(scale, 448.0), "v_scale")
    assert (val.float() == 0).all()


@each_activations
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_v_up_quantized_row_that_is_not_finite_poisons_itself_only(rng, device, dtype, value, activations):
    clean = randn(rng, 9, 3, 512, dtype=dtype, device=device)
    weight = random_weight(rng, 3, 128, 512, device)
    dirty = clean.clone()
    dirty[4, 1, 300] = value
    options = ACTIVATIONS[activations]
    (val, scale), (want_val, want_scale) = (v_up_quantized(o, *weight, **options) for o in (dirty, clean))
    assert val[4, 128:256].float().isnan().all() and scale[4, 1].isnan()
    val[4, 128:256], scale[4, 1] = want_val[4, 128:256], want_scale[4, 1]
    assert_same_bits(val, want_val, "v_val of other rows")
    assert_same_bits(scale, want_scale, "v_scale of other rows")


def test_v_up_quantized_nan_weight_makes_its_head_nan(rng, device, dtype):
    """One column of a head is NaN, and so is the scale that its columns share."""
    o_latent = randn(rng, 9, 3, 512, dtype=dtype, device=device)
    w_uv, w_uv_scale = random_weight(rng, 3, 128, 512, device)
    want_val, want_scale = v_up_quantized(o_latent, w_uv, w_uv_scale)
    w_uv.view(torch.uint8)[1, 100, 500] = 0x7F
    val, scale = v_up_quantized(o_latent, w_uv, w_uv_scale)
    assert scale[:, 1].isnan().all() and val[:, 128:256].float().isnan().all()
    val[:, 128:256], scale[:, 1] = want_val[:, 128:256], want_scale[:, 1]
    assert_same_bits(val, want_val, "v_val of other heads")
    assert_same_bits(scale, want_scale, "v_scale of other heads")


def test_v_up_quantized_infinite_product_makes_an_infinite_scale(device):
    o_latent = torch.full((1, 1, 128), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16, device=device)
    w_uv = torch.zeros(1, 128, 128, device=device)
    w_uv[0, 7], w_uv[0, 9] = 1.0, -1.0
    val, scale = v_up_quantized(o_latent, w_uv.to(E4M3), torch.full((1, 1, 1), 100.0, device=device))
    assert scale.isinf().all()
    assert val.float().isnan().nonzero()[:, 1].tolist() == [7, 9]  # Inf * (1 / Inf), as the reference does
    assert (val.float().nan_to_num() == 0).all()


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("s", [1, 65])
def test_v_up_quantized_takes_strided_input(rng, device, dtype, layout, s):
    o_latent = randn(rng, s, 3, 512, dtype=dtype, device=device)
    weight = random_weight(rng, 3, 128, 512, device)
    results = v_up_quantized(laid_out(o_latent, ROW_LAYOUTS[layout]), *weight)
    for got, want in zip(results, v_up_quantized(o_latent, *weight), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("val_stride", [384, 385, 512])
@pytest.mark.parametrize("scale_strides", [(1, 68), (3, 1), (7, 500)])
@pytest.mark.parametrize("s", [0, 1, 65])
def test_v_up_quantized_out_takes_strided_views(rng, device, s, val_stride, scale_strides):
    o_latent = randn(rng, s, 3, 512, dtype=torch.bfloat16, device=device)
    weight = random_weight(rng, 3, 128, 512, device)
    val, val_buffer = strided((s, 384), (val_stride, 1), 16, E4M3, device)
    scale, scale_buffer = strided((s, 3), scale_strides, 1, torch.float32, device)
    v_up_quantized.out(o_latent, *weight, val_out=val, scale_out=scale)
    for got, want in zip((val, scale), v_up_quantized(o_latent, *weight), strict=True):
        assert_same_bits(got, want)
    assert_untouched_outside(val_buffer, val)
    assert_untouched_outside(scale_buffer, scale)
