"""BlockFp8Weight in products: the ops' bits, wherever the result goes, and what any other weight gives elsewhere."""

import re

import pytest
import torch
from block_weights import EXTENTS, HEADS, exact_result, make, op_result, token_major
from helpers import (
    EXACT_FROBENIUS,
    ROUNDING_FROBENIUS,
    WEIGHT_LAYOUTS,
    assert_frobenius,
    assert_same_bits,
    assert_untouched_outside,
    laid_out,
    randn,
    random_weight,
    strided,
)

from mla_fp8 import BlockFp8Weight
from mla_fp8.weights.block_fp8_weight import counts, reset_counts

S = 5
each_extents = pytest.mark.parametrize("extents", EXTENTS)
PRODUCTS = {
    "torch.bmm": lambda x, w: torch.bmm(x, w),
    "method": lambda x, w: x.bmm(w),
    "by_name": lambda x, w: torch.bmm(input=x, mat2=w),
    "matmul": lambda x, w: torch.matmul(x, w),
    "at": lambda x, w: x @ w,
    "aten": lambda x, w: torch.ops.aten.bmm(x, w),
    "out_is_none": lambda x, w: torch.bmm(x, w, out=None),
    "transposed_twice": lambda x, w: torch.bmm(x, w.mT.transpose(-1, -2)),
}
# H, S, N -> strides and offset of a [H, S, N] to write to, in one buffer.
OUTS = {
    "token_major": lambda h, s, n: ((n, h * n, 1), 0),
    "head_major": lambda h, s, n: ((s * n, n, 1), 0),
    "slice_of_q": lambda h, s, n: ((n + 64, h * (n + 64), 1), 0),
    "behind_others": lambda h, s, n: ((n + 64, h * (n + 64), 1), 64),
}
WRITERS = {
    "torch.bmm": lambda x, w, out: torch.bmm(x, w, out=out),
    "matmul": lambda x, w, out: torch.matmul(x, w, out=out),
    "aten": lambda x, w, out: torch.ops.aten.bmm.out(x, w, out=out),
}


@pytest.fixture(autouse=True)
def from_zero():
    reset_counts()


@pytest.mark.parametrize("product", PRODUCTS)
@each_extents
def test_product_has_the_bits_of_the_op(rng, device, dtype, extents, product):
    weight = make(rng, extents, dtype=dtype, device=device)
    x = token_major(rng, weight, S)
    got = PRODUCTS[product](x.transpose(0, 1), weight)
    assert type(got) is torch.Tensor
    assert_same_bits(got.transpose(0, 1), op_result(x, weight))
    assert_frobenius(got.transpose(0, 1), exact_result(x, weight), EXACT_FROBENIUS[dtype])
    assert got.transpose(0, 1).is_contiguous(), "token-major, so that o_proj needs no copy"
    assert counts() == (1, 0)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("layout", OUTS)
@each_extents
def test_product_writes_into_out(rng, device, extents, layout, writer):
    weight = make(rng, extents, device=device)
    n = EXTENTS[extents][0]
    x = token_major(rng, weight, S)
    out, buffer = strided((HEADS, S, n), *OUTS[layout](HEADS, S, n), torch.bfloat16, device)
    assert WRITERS[writer](x.transpose(0, 1), weight, out) is out
    assert_same_bits(out.transpose(0, 1), op_result(x, weight))
    assert_untouched_outside(buffer, out)
    assert counts() == (1, 0)


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
@each_extents
def test_parts_may_be_views(rng, device, extents, layout):
    value, scale = random_weight(rng, HEADS, *EXTENTS[extents], device=device)
    want = BlockFp8Weight(value, scale)
    weight = BlockFp8Weight(laid_out(value.view(torch.uint8), WEIGHT_LAYOUTS[layout]).view(value.dtype),
                            scale.mT.contiguous().mT)  # fmt: skip
    x = token_major(rng, want).transpose(0, 1)
    assert_same_bits(torch.bmm(x, weight), torch.bmm(x, want))
    assert_same_bits(weight.dequantize(), want.dequantize())


@pytest.mark.parametrize("s", [0, 1, 2, 130])
def test_product_edge_shapes(rng, device, s):
    weight = make(rng, heads=1, device=device)
    x = token_major(rng, weight, s)
    assert_same_bits(torch.bmm(x.transpose(0, 1), weight).transpose(0, 1), op_result(x, weight))
    assert counts() == (1, 0)


@each_extents
def test_dequantize_gives_the_numbers_of_the_blocks(rng, device, dtype, extents):
    weight = make(rng, extents, dtype=dtype, device=device)
    want = (weight.weight.double() * weight.scale.double().repeat_interleave(128, 1).repeat_interleave(128, 2)).mT
    assert torch.equal(weight.dequantize(torch.float64), want)
    assert_same_bits(weight.dequantize(torch.float32), want.float())
    assert_same_bits(weight.dequantize(), want.float().to(dtype))
    assert_same_bits(weight.mT.dequantize(), want.float().to(dtype).mT)
    assert weight.dequantize().mT.is_contiguous()


def looks(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_contiguous()


@each_extents
def test_weight_looks_like_its_numbers(rng, device, dtype, extents):
    weight = make(rng, extents, dtype=dtype, device=device)
    assert looks(weight) == looks(weight.dequantize())
    assert looks(weight.mT) == looks(weight.dequantize().mT)


# Products that an op does not take are those of the numbers.
OTHERS = {
    "other_contraction": lambda rng, w: (randn(rng, HEADS, S, 512, dtype=torch.bfloat16), w.mT),
    "last_dim_not_contiguous": lambda rng, w: (randn(rng, HEADS, 128, S, dtype=torch.bfloat16).mT, w),
    "from_the_left": lambda rng, w: (w, randn(rng, HEADS, 512, S, dtype=torch.bfloat16)),
    "by_itself": lambda rng, w: (w, w.mT),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_product_is_that_of_the_numbers(rng, device, other):
    weight = make(rng, device=device)
    factors = [factor.to(device) for factor in OTHERS[other](rng, weight)]
    plain = [t.dequantize() if isinstance(t, BlockFp8Weight) else t for t in factors]
    reset_counts()
    got = torch.bmm(*factors)
    assert type(got) is torch.Tensor and counts().products == 0 and counts().dequantizations >= 1
    assert_frobenius(got, torch.bmm(*(t.double() for t in plain)), ROUNDING_FROBENIUS)


def test_out_that_no_op_writes_gets_the_product_of_the_numbers(rng, device):
    weight = make(rng, device=device)
    x = token_major(rng, weight, S)
    out = torch.empty(HEADS, 512, S, dtype=torch.bfloat16, device=device).mT
    assert torch.bmm(x.transpose(0, 1), weight, out=out) is out
    assert_frobenius(out.transpose(0, 1), exact_result(x, weight), 2 * ROUNDING_FROBENIUS)
    assert counts() == (0, 1)


def test_product_broadcasts_as_matmul_does(rng):
    weight = make(rng)
    x = randn(rng, S, 128, dtype=torch.bfloat16)
    assert_frobenius(x @ weight, x.double() @ weight.dequantize(torch.float64), ROUNDING_FROBENIUS)


def test_einsum_is_right(rng):
    weight = make(rng)
    x = token_major(rng, weight, S)
    got = torch.einsum("shk,hkn->shn", x, weight)
    assert type(got) is torch.Tensor
    assert_frobenius(got, exact_result(x, weight), ROUNDING_FROBENIUS + EXACT_FROBENIUS[torch.bfloat16])


def test_activations_that_require_grad_get_the_gradient_of_the_numbers(rng):
    weight = make(rng)
    x = token_major(rng, weight, S).transpose(0, 1).clone().requires_grad_()
    torch.bmm(x, weight).sum().backward()
    want = weight.dequantize().sum(2)[:, None].expand_as(x)
    assert_frobenius(x.grad, want.double(), 2 * ROUNDING_FROBENIUS)
    with torch.no_grad():
        reset_counts()
        torch.bmm(x, weight)
        assert counts() == (1, 0)


@pytest.mark.parametrize("wrong", ["dtype", "rank", "heads", "k"])
def test_product_fails_as_a_plain_one(rng, wrong):
    weight = make(rng)
    x = token_major(rng, weight, S).transpose(0, 1)
    x = {"dtype": x.half(), "rank": x[0], "heads": x[1:], "k": x[..., :64]}[wrong]
    with pytest.raises(RuntimeError) as want:
        torch.bmm(x, weight.dequantize())
    with pytest.raises(RuntimeError, match=re.escape(str(want.value))):
        torch.bmm(x, weight)
    assert counts().products == 0


def test_what_is_no_tensor_fails_as_in_a_plain_product(rng):
    weight = make(rng)
    x = token_major(rng, weight, S).transpose(0, 1)
    for call in (lambda w: torch.bmm(3, w), lambda w: torch.bmm(None, w), lambda w: torch.bmm(x, w, out=3)):
        for each in (weight, weight.dequantize()):
            with pytest.raises(TypeError, match=r"^bmm\(\)"):
                call(each)


def test_out_is_checked_by_the_op(rng):
    weight = make(rng)
    x = token_major(rng, weight, S).transpose(0, 1)
    out = torch.zeros(HEADS, S, 512, dtype=torch.bfloat16)
    for wrong, rule in ((out[..., 1:], "have shape"), (out[:, :1].expand(-1, S, -1), "have each element in a place"),
                        (out.half(), "be bfloat16")):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"absorb_q: q_out must {rule}"):
            torch.bmm(x, weight, out=wrong)
    with pytest.raises(RuntimeError, match="absorb_q: q_out must not overlap q_nope"):
        torch.bmm(x, make(rng, "square"), out=x)
    assert not out.any() and counts().products == 0


def test_device_without_kernels_gets_the_product_of_the_numbers(rng, monkeypatch):
    """A GPU of another architecture, here by a reason that is set by hand."""
    monkeypatch.setattr("mla_fp8.weights.block_fp8_weight.refusal", lambda device: "no kernel runs here")
    weight = make(rng)
    x = token_major(rng, weight, S).transpose(0, 1)
    assert_same_bits(torch.bmm(x, weight), torch.bmm(x, weight.dequantize()))
    assert counts().products == 0


BAD_PARTS = {
    "dtype must be torch.bfloat16 or torch.float16, got torch.float32": lambda w, s: (w, s, torch.float32),
    "weight must be a Tensor, got list": lambda w, s: ([], s),
    "weight must be torch.float8_e4m3fn, got torch.bfloat16": lambda w, s: (w.bfloat16(), s),
    "weight must have 3 dimensions, got [512, 128]": lambda w, s: (w[0], s),
    "weight must have at least one head, got [0, 512, 128]": lambda w, s: (w[:0], s[:0]),
    "weight's N must be a multiple of 128,": lambda w, s: (w[:, :64], s),
    "weight's K must be a multiple of 128,": lambda w, s: (w[..., :64], s),
    "weight must have a contiguous last dim, got strides [65536, 1, 512]": lambda w, s: (
        w.view(torch.uint8).mT.contiguous().mT.view(w.dtype), s),
    "weight must have strides that are multiples of 16, but for the last dim, got strides [67584, 132, 1]": lambda w, s:
        (torch.zeros(2, 512, 132, dtype=torch.uint8)[..., :128].view(w.dtype), s),
    "scale must be a Tensor, got float": lambda w, s: (w, 1.0),
    "scale must be torch.float32, got torch.bfloat16": lambda w, s: (w, s.bfloat16()),
    "scale must be [2, 4, 1], one scale a 128x128 block of weight, got [2, 1, 4]": lambda w, s: (w, s.mT),
    "scale must be on cpu, got meta": lambda w, s: (w, s.to("meta")),
}  # fmt: skip


@pytest.mark.parametrize("said", BAD_PARTS)
def test_constructor_rejects(rng, said):
    with pytest.raises(ValueError, match=re.escape(f"BlockFp8Weight: {said}")):
        BlockFp8Weight(*BAD_PARTS[said](*random_weight(rng, 2, 512, 128)))
