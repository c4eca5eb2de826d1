"""absorb_q is the reference's sum rounded once (on a CPU nearly: an fp32 sum).

With FP8 activations it has the bits of the three steps.
"""

import pytest
import torch
from cases import ACTIVATIONS, OPS, ROPE_DIM, SHAPES, each_activations, each_shape, each_shape_and_activations
from helpers import (
    CALC_DIFF,
    EXACT_FROBENIUS,
    FP8_FROBENIUS,
    FP8_TWICE_FROBENIUS,
    ROUNDING_FROBENIUS,
    assert_frobenius,
    assert_rounded,
    assert_same_bits,
    calc_diff,
    rand,
    randn,
    random_weight,
    reference_product,
)

from mla_fp8 import reference

absorb_q = OPS.absorb_q


def sums_of_q(q_nope, weight, q_pe=None, activations="exact"):
    sums, error = reference_product(*reference.keep_or_quantize(q_nope, activations), *weight)
    if q_pe is not None:
        sums = torch.cat([sums, q_pe.double()], -1)
        error = torch.nn.functional.pad(error, (0, q_pe.shape[-1]))
    return sums, error


def assert_matches_reference(q_nope, weight, q_pe=None, out_scale=None, activations="exact"):
    got = absorb_q(q_nope, *weight, q_pe, out_scale, **ACTIVATIONS[activations])
    sums, error = sums_of_q(q_nope, weight, q_pe, activations)
    if out_scale is None:
        assert_rounded(got, sums, error, lambda x: x.to(q_nope.dtype))
    else:
        assert_rounded(got, sums, error, lambda x: reference.to_fp8(x, out_scale))
    return got, sums


@each_shape_and_activations
def test_absorb_q_matches_reference(rng, device, dtype, s, h, activations):
    q_nope = randn(rng, s, h, 128, dtype=dtype, device=device)
    weight = random_weight(rng, h, 512, 128, device)
    got, sums = assert_matches_reference(q_nope, weight, activations=activations)
    assert_frobenius(got, sums, ROUNDING_FROBENIUS)


@pytest.mark.parametrize("s,h", [shape for shape in SHAPES if shape[0] <= 257 and shape[1] < 128])
def test_absorb_q_matches_reference_with_pe_and_out_scale(rng, device, dtype, s, h):
    q_nope = randn(rng, s, h, 128, dtype=dtype, device=device)
    q_pe = randn(rng, s, h, ROPE_DIM, dtype=dtype, device=device)
    out_scale = torch.tensor([0.004], device=device)
    assert_matches_reference(q_nope, random_weight(rng, h, 512, 128, device), q_pe, out_scale)


@pytest.mark.parametrize("d,r,p", [(128, 128, 16), (256, 512, 64), (384, 256, 128), (512, 384, 256), (128, 1024, 48)])
@pytest.mark.parametrize("s,activations", [(0, "exact"), (1, "exact"), (65, "exact"), (65, "fp8")])
def test_absorb_q_matches_reference_for_other_dims(rng, device, s, d, r, p, activations):
    q_nope = randn(rng, s, 2, d, dtype=torch.bfloat16, device=device)
    q_pe = randn(rng, s, 2, p, dtype=torch.bfloat16, device=device)
    assert_matches_reference(q_nope, random_weight(rng, 2, r, d, device), q_pe, activations=activations)


@pytest.mark.parametrize("rope", [False, True])
def test_absorb_q_result_is_contiguous(rng, device, dtype, rope):
    q_nope = randn(rng, 5, 3, 128, dtype=dtype, device=device)
    q_pe = randn(rng, 5, 3, ROPE_DIM, dtype=dtype, device=device) if rope else None
    q = absorb_q(q_nope, *random_weight(rng, 3, 512, 128, device), q_pe)
    assert q.shape == (5, 3, 576 if rope else 512) and q.dtype == dtype and q.is_contiguous()


@each_shape
def test_absorb_q_has_the_bits_of_bmm(rng, device, s, h):
    q_nope = randn(rng, s, h, 128, dtype=torch.bfloat16, device=device)
    weight = random_weight(rng, h, 512, 128, device)
    want = OPS.bmm(*OPS.quantize_q_nope(q_nope), *weight, m=s).transpose(0, 1)
    assert_same_bits(absorb_q(q_nope, *weight, fp8_activations=True), want)


@pytest.mark.parametrize("d,r", [(256, 256), (384, 128), (512, 384)])
def test_absorb_q_has_the_bits_of_bmm_for_other_dims(rng, device, d, r):
    q_nope = randn(rng, 65, 3, d, dtype=torch.bfloat16, device=device)
    weight = random_weight(rng, 3, r, d, device)
    want = OPS.bmm(*OPS.quantize_q_nope(q_nope), *weight, m=65).transpose(0, 1)
    assert_same_bits(absorb_q(q_nope, *weight, fp8_activations=True), want)


@each_activations
@pytest.mark.parametrize("s", [1, 64])
def test_absorb_q_is_near_exact_arithmetic(rng, device, dtype, s, activations):
    q_nope = randn(rng, s, 16, 128, dtype=dtype, device=device)
    weight = random_weight(rng, 16, 512, 128, device)
    want = torch.einsum("shd,hrd->shr", q_nope.double(), reference.dequantize_blocks(*weight))
    got = absorb_q(q_nope, *weight, **ACTIVATIONS[activations])
    assert_frobenius(got, want, EXACT_FROBENIUS[dtype] if activations == "exact" else FP8_FROBENIUS)
    assert calc_diff(got, want) < CALC_DIFF


@each_activations
def test_absorb_q_fp8_is_near_exact_arithmetic(rng, device, dtype, activations):
    q_nope = randn(rng, 64, 16, 128, dtype=dtype, device=device)
    weight = random_weight(rng, 16, 512, 128, device)
    want = torch.einsum("shd,hrd->shr", q_nope.double(), reference.dequantize_blocks(*weight))
    out_scale = torch.tensor([0.02], device=device)
    got = absorb_q(q_nope, *weight, out_scale=out_scale, **ACTIVATIONS[activations]).double() * out_scale.double()
    assert_frobenius(got, want, FP8_FROBENIUS if activations == "exact" else FP8_TWICE_FROBENIUS)
    assert calc_diff(got, want) < CALC_DIFF


def test_absorb_q_copies_q_pe(rng, device, dtype):
    every = torch.arange(2**16, device=device).to(torch.int16).view(dtype)[: 1020 * ROPE_DIM].view(340, 3, ROPE_DIM)
    q_nope = randn(rng, 340, 3, 128, dtype=dtype, device=device)
    weight = random_weight(rng, 3, 128, 128, device)
    q = absorb_q(q_nope, *weight, every)
    assert_same_bits(q[..., 128:], every, "rope columns")
    assert_same_bits(q[..., :128], absorb_q(q_nope, *weight), "latent columns")


@pytest.mark.parametrize("out_scale", [1.0, 0.003, 2.0**-12, 70.0])
def test_absorb_q_fp8_rounds_q_pe_as_the_reference(rng, device, dtype, out_scale):
    every = torch.arange(2**16, device=device).to(torch.int16).view(dtype)[: 1020 * ROPE_DIM].view(340, 3, ROPE_DIM)
    q_nope = randn(rng, 340, 3, 128, dtype=dtype, device=device)
    out_scale = torch.tensor(out_scale, device=device)
    q = absorb_q(q_nope, *random_weight(rng, 3, 128, 128, device), every, out_scale)
    assert_same_bits(q[..., 128:].contiguous(), reference.to_fp8(every, out_scale), "rope columns")


@each_activations
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_absorb_q_row_that_is_not_finite_poisons_itself_only(rng, device, dtype, value, fp8, activations):
    clean = randn(rng, 9, 3, 256, dtype=dtype, device=device)
    weight = random_weight(rng, 3, 256, 256, device)
    dirty = clean.clone()
    dirty[4, 1, 200] = value
    out_scale = torch.tensor([0.01], device=device) if fp8 else None
    got, want = (absorb_q(q, *weight, out_scale=out_scale, **ACTIVATIONS[activations]) for q in (dirty, clean))
    assert got[4, 1].float().isnan().all()
    got[4, 1] = want[4, 1]
    assert_same_bits(got, want, "other rows")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_absorb_q_exact_row_that_is_not_finite_is_nan_beside_zero_weights(rng, device, dtype, value):
    q_nope = randn(rng, 9, 3, 256, dtype=dtype, device=device)
    w_uk, w_uk_scale = random_weight(rng, 3, 256, 256, device)
    w_uk.view(torch.uint8)[:, ::2] = 0
    q_nope[4, 1, 200] = value
    got = absorb_q(q_nope, w_uk, w_uk_scale)
    assert got.isnan().any(-1).nonzero().tolist() == [[4, 1]]
    assert got[4, 1].isnan().all()


@each_activations
@pytest.mark.parametrize("fp8", [False, True])
def test_absorb_q_nan_weight_poisons_its_column_only(rng, device, dtype, fp8, activations):
    q_nope = randn(rng, 9, 3, 128, dtype=dtype, device=device)
    q_nope[3] = 0
    w_uk, w_uk_scale = random_weight(rng, 3, 256, 128, device)
    out_scale = torch.tensor([0.01], device=device) if fp8 else None
    options = {"out_scale": out_scale, **ACTIVATIONS[activations]}
    want = absorb_q(q_nope, w_uk, w_uk_scale, **options)
    w_uk.view(torch.uint8)[1, 100, 7] = 0xFF
    w_uk.view(torch.uint8)[2, 0, 127] = 0x7F
    got = absorb_q(q_nope, w_uk, w_uk_scale, **options)
    for h, r in ((1, 100), (2, 0)):
        assert got[:, h, r].float().isnan().all()
        got[:, h, r] = want[:, h, r]
    assert_same_bits(got, want, "other columns")


@each_activations
@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-38, 1e-7, 3e-5, 6e4])
def test_absorb_q_matches_reference_at_any_magnitude(rng, device, dtype, magnitude, activations):
    """Of bf16 two are subnormal, with weights that make the result a normal number; of fp16 both are zero."""
    q_nope = ((rand(rng, 17, 2, 128) * 2 - 1) * magnitude).to(device, dtype)
    w_uk, w_uk_scale = random_weight(rng, 2, 256, 128, device)
    w_uk_scale *= 1e6 if 0 < magnitude < 1e-30 else 1
    assert_matches_reference(q_nope, (w_uk, w_uk_scale), activations=activations)


@each_activations
def test_absorb_q_matches_reference_with_outliers(rng, device, dtype, activations):
    q_nope = randn(rng, 17, 2, 256, dtype=dtype, device=device)
    q_nope[:, :, 5] *= 3000
    q_nope[3, 1, 130:140] *= 10000
    assert_matches_reference(q_nope, random_weight(rng, 2, 256, 256, device), activations=activations)


@each_activations
def test_absorb_q_matches_reference_at_the_largest_values(device, dtype, activations):
    q_nope = torch.full((5, 2, 128), torch.finfo(dtype).max, dtype=dtype, device=device)
    q_nope[1] = -q_nope[1]
    weight = random_weight(torch.Generator().manual_seed(0), 2, 256, 128, device)
    assert_matches_reference(q_nope, weight, activations=activations)


@each_activations
def test_absorb_q_overflows_to_infinity(device, dtype, activations):
    q_nope = torch.full((1, 1, 128), torch.finfo(dtype).max, dtype=dtype, device=device)
    w_uk = torch.full((1, 128, 128), -1.0, device=device).to(torch.float8_e4m3fn)
    q = absorb_q(q_nope, w_uk, torch.full((1, 1, 1), 100.0, device=device), **ACTIVATIONS[activations])
    assert (q == float("-inf")).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_absorb_q_fp8_turns_infinity_into_448(device, sign):
    q_nope = torch.full((1, 1, 128), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16, device=device)
    w_uk = torch.full((1, 128, 128), sign, device=device).to(torch.float8_e4m3fn)
    q_pe = torch.full((1, 1, 16), sign * float("inf"), dtype=torch.bfloat16, device=device)
    q = absorb_q(q_nope, w_uk, torch.full((1, 1, 1), 100.0, device=device), q_pe, torch.ones(1, device=device))
    assert (q.float() == sign * 448).all()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_absorb_q_takes_out_scale_of_any_rank(rng, device, shape):
    q_nope = randn(rng, 5, 2, 128, dtype=torch.bfloat16, device=device)
    weight = random_weight(rng, 2, 256, 128, device)
    assert_matches_reference(q_nope, weight, out_scale=torch.full(shape, 0.01, device=device))
