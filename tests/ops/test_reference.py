"""The reference is the specification, so it is checked against the formulas written out by hand."""

import math

import helpers
import pytest
import strategies
import torch
from cases import CASE, OPS
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_fp8 import reference


def e4m3_values():
    """Every finite e4m3 by its definition: 1 sign bit, 4 exponent bits biased by 7, 3 fraction bits, no infinity."""
    values = {}
    for code in range(256):
        sign, exponent, fraction = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
        if code & 0x7F == 0x7F:
            continue
        values[code] = sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))
    return values


def test_reference_e4m3_codes_mean_what_the_format_says():
    for code, value in e4m3_values().items():
        assert torch.tensor(code, dtype=torch.uint8).view(helpers.E4M3).item() == value


def test_reference_rounds_to_the_nearest_code_and_ties_to_even(rng):
    """By search over all codes, without torch's conversion."""
    values = e4m3_values()
    midpoints = [(values[c] + values[c + 1]) / 2 for c in range(0x7E)]
    numbers = midpoints + [-m for m in midpoints] + (torch.rand(500, generator=rng) * 1000 - 500).tolist()
    got = reference.to_fp8(torch.tensor(numbers, dtype=torch.float64), torch.tensor(1.0)).view(torch.uint8).tolist()
    for number, code in zip(numbers, got, strict=True):
        nearest = min(abs(value - number) for value in values.values())
        ties = [c for c, value in values.items() if abs(value - number) == nearest and (c >= 0x80) == (number < 0)]
        assert code == (ties[0] if len(ties) == 1 else next(c for c in ties if c % 2 == 0)), number


def test_reference_scale_is_amax_over_448(rng):
    x = helpers.randn(rng, 5, 3, 256)
    val, scale = reference.quantize(x)
    groups = x.view(5, 3, 2, 128)
    for index in [(0, 0, 0), (4, 2, 1), (2, 1, 0)]:
        amax = max(abs(v) for v in groups[index].tolist())
        assert math.isclose(scale[index].item(), amax / 448, rel_tol=2**-23)
        position = int(groups[index].abs().argmax())
        assert abs(val.view(5, 3, 2, 128)[index][position].item()) == 448


def test_reference_dequantizes_within_the_format_error(rng):
    """3 fraction bits: half a step of 2^-3 relative, and half of the least subnormal 2^-9 below 2^-6."""
    x = helpers.randn(rng, 64, 3, 256)
    val, scale = reference.quantize(x)
    step = scale.double().repeat_interleave(128, -1)
    bound = torch.maximum(x.double().abs() * 2.0**-4, step * 2.0**-10) * (1 + 2.0**-20)
    assert ((val.double() * step - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("activations", ["exact", "fp8"])
@pytest.mark.parametrize("name", ["absorb_q", "absorb_q-pe", "v_up"])
def test_reference_product_is_the_sum_written_out(rng, dtype, name, activations):
    arguments = CASE[name].arguments(rng, 2, 2, dtype)
    x, w, w_scale, *rest = arguments.values()
    val, scale = reference.quantize(x) if activations == "fp8" else (x, torch.ones(2, 2, x.shape[2] // 128))
    got = getattr(reference, name.split("-")[0])(**arguments, activations=activations)
    for s, h, n in [(0, 0, 0), (1, 1, 127), (1, 0, 77)]:
        total = math.fsum(
            val[s, h, k].item()
            * scale[s, h, k // 128].item()
            * w[h, n, k].item()
            * w_scale[h, n // 128, k // 128].item()
            for k in range(x.shape[2])
        )
        assert got[s, h, n].item() == torch.tensor(total, dtype=torch.float64).to(dtype).item()
    if rest:
        helpers.assert_same_bits(got[..., -rest[0].shape[-1] :], rest[0])


def test_reference_bmm_is_absorb_q_by_heads(rng):
    arguments = CASE["absorb_q"].arguments(rng, 9, 3)
    q_nope, *weight = arguments.values()
    got = reference.bmm(*reference.quantize_q_nope(q_nope), *weight, m=9).transpose(0, 1)
    helpers.assert_same_bits(got, reference.absorb_q(**arguments, activations="fp8"))


# Factors of products by their place in a block; those of the one product that the next block takes away; what is left.
CUT = {
    "13 bits below the largest stay": ({0: (256, 256), 7: (8, 1)}, (256, 256), 8),
    "what is below is cut": ({0: (256, 256), 7: (4, 1)}, (256, 256), 0),
    "each addend by itself": ({0: (256, 256), 7: (4, 1), 14: (4, 1)}, (256, 256), 0),
    "towards zero": ({0: (256, 256), 7: (-12, 1)}, (256, 256), -8),
    "of 1.75 * 1.75 the exponent is 0": (
        {0: (1.75, 1.75), 7: (2**-6, 2**-7), 14: (2**-6, 2**-7)},
        (1.75, 1.75),
        2**-12,
    ),
    "a subnormal factor has the exponent -6": ({0: (2**-9, 256), 7: (2**-6, 2**-6)}, (0.5, 1), 0),
    "a zero has none": ({0: (0, 448), 7: (2**-6, 2**-6)}, (0, 1), 2**-12),
    "the sum has 13 bits below its own exponent": ({96: (448, 448), 103: (8, 1)}, (448, 448), 0),
    "and is cut but once": ({96: (448, 448), 103: (8, 1), 110: (8, 1)}, (448, 448), 16),
    "later products are cut by the sum so far": ({0: (256, 256), 32: (4, 1)}, (256, 256), 0),
    "and it by them": ({0: (-12, 1), 32: (256, 256)}, (256, 256), -8),
    "32 products are a step": ({0: (4, 1), 7: (4, 1), 30: (256, 256)}, (256, 256), 0),
    "and no more": ({0: (4, 1), 7: (4, 1), 32: (256, 256)}, (256, 256), 8),
}


def one_sum(*blocks, device="cpu"):
    """Codes [1,1,K] and [1,128,K] of the factors in each block, as a row and weights, whose other rows are zero."""
    a, b = torch.zeros(1, 1, 128 * len(blocks)), torch.zeros(1, 128, 128 * len(blocks))
    for i, block in enumerate(blocks):
        for place, (x, y) in block.items():
            a[0, 0, 128 * i + place], b[0, 0, 128 * i + place] = x, y
    return a.to(device, helpers.E4M3), b.to(device, helpers.E4M3)


@pytest.mark.parametrize("name", CUT)
def test_reference_and_tensor_cores_cut(device, name):
    """The next block is added in fp32, so that bf16 shows the last bits of the first."""
    factors, (x, y), want = CUT[name]
    a, b = one_sum(factors, {0: (-x, y)}, device=device)
    arguments = (a, torch.ones(1, 1, 2, device=device), b, torch.ones(1, 1, 2, device=device))
    got = reference.bmm(*arguments, product=reference.tensor_core_product)
    assert got[0, 0, 0].item() == want
    assert not got[..., 1:].any()
    if device == "cuda":
        helpers.assert_same_bits(OPS.bmm(*arguments), got)


def test_reference_tensor_core_product_adds_blocks_in_fp32():
    a, b = one_sum({0: (256, 256)}, {0: (3, 1)})
    got = reference.tensor_core_product(a, torch.tensor([[[1.0, 2.0**-7]]]), b, torch.ones(1, 1, 2))
    assert got[0, 0, 0].item() == 65536 + 3 * 2**-7  # 24 bits; a tensor core keeps 14


@pytest.mark.parametrize("sign", [-1, 1])
def test_reference_and_kernels_round_a_block_added_once(device, sign):
    """3 * (1 + 2^-23) is half way between two fp32; the block before it, too small for fp64, says which is nearer."""
    a, b = one_sum(*({0: (x, 1)} for x in (sign, 3, -3)), device=device)  # the last leaves the last bits, for bf16
    a_scale, b_scale = torch.tensor([[[2.0**-60, 1 + 2**-23, 1]]], device=device), torch.ones(1, 1, 3, device=device)
    got = reference.bmm(a, a_scale, b, b_scale, product=reference.tensor_core_product)
    assert got[0, 0, 0].item() == (2**-21 if sign > 0 else 2**-22)
    helpers.assert_same_bits(OPS.bmm(a, a_scale, b, b_scale), got)


def test_reference_and_kernels_round_the_product_of_scales(device):
    """(1 + 2^-12)^2 is 1 + 2^-11 + 2^-24, of which fp32 keeps 1 + 2^-11, and the second block takes that away."""
    a, b = one_sum({0: (3, 1)}, {0: (-3, 1)}, device=device)
    a_scale = torch.tensor([[[1 + 2**-12, 1.0]]], device=device)
    b_scale = torch.tensor([[[1 + 2**-12, 1 + 2**-11]]], device=device)
    got = reference.bmm(a, a_scale, b, b_scale, product=reference.tensor_core_product)
    assert not got.any()
    helpers.assert_same_bits(OPS.bmm(a, a_scale, b, b_scale), got)


@pytest.mark.parametrize("activations", ["exact", "fp8"])
@pytest.mark.parametrize("s", [0, 1, 65])
def test_reference_tensor_core_product_is_near_the_exact_one(rng, dtype, monkeypatch, s, activations):
    w, w_scale = helpers.random_weight(rng, 3, 256, 512)
    x = reference.keep_or_quantize(helpers.randn(rng, s, 3, 512, dtype=dtype), activations)
    got = reference.tensor_core_product(*x, w, w_scale)
    helpers.assert_frobenius(got, reference.exact_product(*x, w, w_scale), 2e-4)
    monkeypatch.setattr(reference, "MOST_ADDENDS", 100_000)  # a few rows at a time
    helpers.assert_same_bits(reference.tensor_core_product(*x, w, w_scale), got)


@pytest.mark.parametrize("activations", ["exact", "fp8"])
@settings(max_examples=25)
@given(data=st.data(), x=strategies.activations())
def test_reference_tensor_core_product_is_near_the_exact_one_for_any_input(activations, data, x):
    """A step cuts 33 addends and their sum, each by less than 2^-13 of the largest, or of 2^-6 times a factor."""
    x, x_scale = reference.keep_or_quantize(x[:9], activations)
    w, w_scale = data.draw(strategies.weights(x.shape[1], x.shape[2], n=128))
    val, scale = reference.split(x) if x_scale is None else (x.unsqueeze(0), x_scale)
    a, b = (codes.double().abs().nan_to_num(0).unflatten(-1, (-1, 128)) for codes in (val, w))
    terms = torch.einsum("tshgk,hngk->shng", a, b)
    largest = torch.einsum("shg,hng->shng", *(factors.amax(-1).clamp(min=2**-6) for factors in (a.amax(0), b)))
    scales = (scale.double()[:, :, None] * w_scale.double().repeat_interleave(128, 1)).abs().nan_to_num(0, math.inf)
    cut = len(val) * 4 * 34 * 2**-13 * torch.maximum(terms, largest)
    lost = 2**-9 * b.sum(-1) * (x_scale is None)  # of activations below a quarter of their scale, or twice it
    error = ((cut + lost + terms * 2**-20) * scales + (terms + 1) * 2**-149).sum(-1)  # fp32's roundings too
    may_overflow = (torch.maximum(terms, torch.ones_like(terms)) * scales).sum(-1) > torch.finfo(torch.float32).max
    got = reference.tensor_core_product(x, x_scale, w, w_scale)
    want = reference.exact_product(x, x_scale, w, w_scale)
    helpers.assert_rounded(got, want, torch.where(may_overflow, math.inf, error), lambda x: x.float())


def test_reference_tensor_core_product_keeps_nan_to_its_row(rng):
    w, w_scale = helpers.random_weight(rng, 1, 128, 256)
    val, scale = reference.quantize(helpers.randn(rng, 3, 1, 256))
    want = reference.tensor_core_product(val, scale, w, w_scale)
    val.view(torch.uint8)[1, 0, 200] = 0xFF
    got = reference.tensor_core_product(val, scale, w, w_scale)
    assert got[1].isnan().all()
    helpers.assert_same_bits(got[::2], want[::2])
