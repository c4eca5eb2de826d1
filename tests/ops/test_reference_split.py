"""Activations as sums of e4m3 terms: every bf16 and fp16 number, and the order in which the terms are added."""

import helpers
import pytest
import torch
from cases import OPS

from mla_fp8 import reference
from mla_fp8.formats import EXACT_TERMS

GROUP = 128
LEAST_SCALE = 2.0**-126
LEAST_STEP = 2.0**-9  # of an e4m3
# In scales: from where on a number is its terms' sum, and by how much one below 2^-6 may be rounded before it is cut.
EXACT_FROM = {torch.bfloat16: 1 / 4, torch.float16: 2.0}
MOST_ROUNDED = {torch.bfloat16: 2.0**-14, torch.float16: 2.0**-17}


def positive_numbers(dtype):
    """Every finite one, zero too, ascending: their codes are consecutive."""
    return torch.arange(torch.tensor(torch.inf, dtype=dtype).view(torch.int16).item(), dtype=torch.int16).view(dtype)


def groups_of(amax, numbers):
    """[groups, 128]: the numbers in turn with both signs, and amax in each group."""
    count = -(-len(numbers) // (GROUP - 1))
    padded = torch.zeros(count * (GROUP - 1), dtype=numbers.dtype)
    padded[: len(numbers)] = numbers
    padded[1::2] *= -1
    return torch.cat([amax.expand(count, 1), padded.view(count, GROUP - 1)], 1)


def test_reference_split_scale_is_the_least_power_of_two(dtype):
    amax = positive_numbers(dtype)
    x = torch.zeros(len(amax), GROUP, dtype=dtype)
    x[:, 77] = -amax
    _, scale = reference.split(x)
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all(), "powers of two"
    amax, scale = amax.double(), scale.double().squeeze(-1)
    assert ((amax <= 448 * scale) & ((amax > 224 * scale) | (scale == LEAST_SCALE))).all()


def test_reference_split_keeps_every_number(dtype):
    """Of all numbers with one scale the largest is an amax, beside every number up to it."""
    numbers = positive_numbers(dtype)
    _, scales = reference.split(numbers.unsqueeze(-1).expand(-1, GROUP))
    firsts = (scales[1:] != scales[:-1]).flatten().nonzero().flatten() + 1
    for first, last in zip([0, *firsts.tolist()], [*firsts.tolist(), len(numbers)], strict=True):
        amax, scale = numbers[last - 1], scales[first].item()
        x = groups_of(amax, numbers[:last])
        terms, got_scale = reference.split(x)
        assert (got_scale == scale).all()
        x, terms = x.double(), terms.double()
        assert (terms * x >= 0).all(), "of its sign"
        lost = (x - terms.sum(0) * scale) * x.sign() / scale
        exact = (x.abs() >= scale * EXACT_FROM[dtype]) | (scale == LEAST_SCALE)
        assert not lost[exact].any(), amax
        assert ((lost >= -MOST_ROUNDED[dtype]) & (lost < LEAST_STEP - MOST_ROUNDED[dtype])).all(), amax


def test_reference_split_has_no_term_to_spare(dtype):
    """One fewer leaves what 4 bits a term do not hold: almost 2^-3 of a number's binade after one, 2^-7 after two."""
    numbers = positive_numbers(dtype).view(-1, GROUP)[-8:]  # normal ones
    terms = EXACT_TERMS[dtype] - 1
    parts, scale = reference.split(numbers, terms)
    lost = numbers.double() - parts.double().sum(0) * scale.double()
    _, exponent = torch.frexp(numbers.double())
    assert (lost / torch.exp2(exponent - 1.0)).max() == 2.0 ** (1 - 4 * terms) - torch.finfo(dtype).eps


# By hand, with the scale 1: a number and its terms.
CUT = {
    torch.bfloat16: [
        (255 / 128, (240 / 128, 15 / 128)),
        (-255 / 128, (-240 / 128, -15 / 128)),
        (255 / 1024, (240 / 1024, 14 / 1024)),  # below 1/4 the last bit may be below 2^-9
        (2**-6 + 15 * 2**-13, (2**-6, 0)),
        (31 * 2**-14, (2**-9, 0)),  # rounded to 16 * 2^-13, which is even
        (247 * 2**-17, (0, 0)),  # rounded to 15 * 2^-13
    ],
    torch.float16: [
        (2047 / 512, (1920 / 512, 120 / 512, 7 / 512)),
        (-2047 / 512, (-1920 / 512, -120 / 512, -7 / 512)),
        (2047 / 1024, (1920 / 1024, 120 / 1024, 6 / 1024)),  # below 2 as well
        (2**-6 + 127 * 2**-16, (2**-6, 0, 0)),
        (255 * 2**-17, (2**-9, 0, 0)),  # rounded to 128 * 2^-16, which is even
        (509 * 2**-18, (0, 0, 0)),  # rounded to 127 * 2^-16
    ],
}


def test_reference_split_cuts_each_term(dtype):
    for number, want in CUT[dtype]:
        x = torch.zeros(GROUP, dtype=dtype)
        x[0], x[9] = 256, number
        assert x[9].item() == number
        terms, scale = reference.split(x)
        assert scale.item() == 1 and tuple(terms[:, 9].tolist()) == want, number


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_reference_split_of_a_group_that_is_not_finite_has_the_scale_nan(rng, dtype, value):
    x = helpers.randn(rng, 3, 256, dtype=dtype)
    want_terms, want_scale = reference.split(x)
    x[1, 200] = value
    terms, scale = reference.split(x)
    assert scale.isnan().nonzero().tolist() == [[1, 1]]
    kept = torch.ones_like(scale, dtype=torch.bool)
    kept[1, 1] = False
    assert torch.equal(scale[kept], want_scale[kept])
    kept = kept.repeat_interleave(GROUP, -1)
    assert torch.equal(terms.view(torch.uint8)[:, kept], want_terms.view(torch.uint8)[:, kept])


@pytest.mark.parametrize("product", [reference.exact_product, reference.tensor_core_product])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reference_makes_a_row_nan_even_where_weights_are_zero(rng, dtype, value, product):
    x, (w, w_scale) = helpers.randn(rng, 3, 2, 256, dtype=dtype), helpers.random_weight(rng, 2, 128, 256)
    w.view(torch.uint8)[:, :, 128:] = 0
    want = product(x, None, w, w_scale)
    x[1, 1, 200] = value
    got = product(x, None, w, w_scale)
    assert got[1, 1].isnan().all()
    got[1, 1] = want[1, 1]
    helpers.assert_same_bits(got.float(), want.float())


# By hand: a number, its terms with the scale 1, and the weight by which the last one's product is 4.
LEAST = {
    torch.bfloat16: (17.0, (16.0, 1.0), 4.0),
    torch.float16: (16 + 33 / 64, (16.0, 0.5, 1 / 64), 256.0),
}


def test_reference_and_kernels_add_the_least_terms_first(device, dtype):
    """Two products of 4 make 8, which 65536 leaves; a 4 beside 65536 is cut. The next group takes 65536 away."""
    number, terms, weight = LEAST[dtype]
    x, w = torch.zeros(1, 1, 256), torch.zeros(1, 128, 256)
    x[..., 0], w[..., 0] = 256, 256
    x[..., [7, 14]], w[..., [7, 14]] = number, weight
    x[..., 128], w[..., 128] = -256, 256
    x, w, w_scale = x.to(device, dtype), w.to(device, helpers.E4M3), torch.ones(1, 1, 2, device=device)
    assert reference.split(x)[0][:, 0, 0, 7].tolist() == list(terms)
    got = reference.absorb_q(x, w, w_scale, product=reference.tensor_core_product)
    assert (got == torch.tensor(2 * number * weight).to(dtype).item()).all()
    if device == "cuda":
        helpers.assert_same_bits(OPS.absorb_q(x, w, w_scale), got)
