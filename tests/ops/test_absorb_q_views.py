"""absorb_q reads and writes any strides in place."""

import pytest
import torch
from cases import OPS, ROPE_DIM
from helpers import (
    E4M3,
    ROW_LAYOUTS,
    SCALE_LAYOUTS,
    WEIGHT_LAYOUTS,
    assert_same_bits,
    assert_untouched_outside,
    laid_out,
    randn,
    random_weight,
    strided,
)

absorb_q = OPS.absorb_q


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("s", [1, 65])
def test_absorb_q_takes_strided_inputs(rng, device, dtype, layout, s):
    q_nope = randn(rng, s, 3, 256, dtype=dtype, device=device)
    q_pe = randn(rng, s, 3, ROPE_DIM, dtype=dtype, device=device)
    weight = random_weight(rng, 3, 128, 256, device)
    layout = ROW_LAYOUTS[layout]
    got = absorb_q(laid_out(q_nope, layout), *weight, laid_out(q_pe, layout))
    assert_same_bits(got, absorb_q(q_nope, *weight, q_pe))


@pytest.mark.parametrize("s", [1, 5])
def test_absorb_q_takes_both_parts_of_q(rng, device, dtype, s):
    q = randn(rng, s, 16, 192, dtype=dtype, device=device)
    weight = random_weight(rng, 16, 512, 128, device)
    q_nope, q_pe = q.split([128, 64], dim=-1)
    assert_same_bits(absorb_q(q_nope, *weight, q_pe), absorb_q(q_nope.contiguous(), *weight, q_pe.contiguous()))


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_absorb_q_takes_strided_weight(rng, device, dtype, layout):
    q_nope = randn(rng, 65, 3, 256, dtype=dtype, device=device)
    w_uk, w_uk_scale = random_weight(rng, 3, 384, 256, device)
    got = absorb_q(q_nope, laid_out(w_uk, WEIGHT_LAYOUTS[layout]), w_uk_scale)
    assert_same_bits(got, absorb_q(q_nope, w_uk, w_uk_scale))


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_absorb_q_takes_strided_scale(rng, device, dtype, layout):
    q_nope = randn(rng, 65, 3, 256, dtype=dtype, device=device)
    w_uk, w_uk_scale = random_weight(rng, 3, 384, 256, device)
    got = absorb_q(q_nope, w_uk, laid_out(w_uk_scale, SCALE_LAYOUTS[layout]))
    assert_same_bits(got, absorb_q(q_nope, w_uk, w_uk_scale))


def test_absorb_q_takes_expanded_inputs(rng, device, dtype):
    q_nope = randn(rng, 1, 3, 128, dtype=dtype, device=device).expand(5, 3, 128)
    q_pe = randn(rng, 5, 1, 64, dtype=dtype, device=device).expand(5, 3, 64)
    w_uk, _ = random_weight(rng, 1, 256, 128, device)
    weight = w_uk.expand(3, 256, 128), torch.full((1, 1, 1), 0.001, device=device).expand(3, 2, 1)
    want = absorb_q(q_nope.contiguous(), *(w.contiguous() for w in weight), q_pe.contiguous())
    assert_same_bits(absorb_q(q_nope, *weight, q_pe), want)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("s", [0, 1, 65])
def test_absorb_q_out_takes_strided_views(rng, device, dtype, s, layout, fp8):
    q_nope = randn(rng, s, 3, 128, dtype=dtype, device=device)
    weight = random_weight(rng, 3, 256, 128, device)
    q_pe = randn(rng, s, 3, ROPE_DIM, dtype=dtype, device=device)
    out_scale = torch.tensor([0.01], device=device) if fp8 else None
    shape = (s, 3, 256 + ROPE_DIM)
    q, buffer = strided(shape, *ROW_LAYOUTS[layout](*shape), E4M3 if fp8 else dtype, device)
    absorb_q.out(q_nope, *weight, q_pe, out_scale, q_out=q)
    assert_same_bits(q, absorb_q(q_nope, *weight, q_pe, out_scale))
    assert_untouched_outside(buffer, q)


@pytest.mark.parametrize("s", [1, 7])
def test_absorb_q_out_takes_the_first_columns_of_a_wider_buffer(rng, device, dtype, s):
    buffer = torch.full((s, 3, 640), float("nan"), dtype=dtype, device=device)
    q_nope = randn(rng, s, 3, 128, dtype=dtype, device=device)
    q_pe = randn(rng, s, 3, 64, dtype=dtype, device=device)
    weight = random_weight(rng, 3, 512, 128, device)
    absorb_q.out(q_nope, *weight, q_pe, q_out=buffer[..., :576])
    assert_same_bits(buffer[..., :576], absorb_q(q_nope, *weight, q_pe))
    assert buffer[..., 576:].isnan().all()


@pytest.mark.parametrize("s", [1, 2, 7])
def test_absorb_q_out_may_lie_beside_its_own_q_pe(rng, device, dtype, s):
    q = randn(rng, s, 3, 576, dtype=dtype, device=device)
    q_pe = q[..., 512:].clone()
    q_nope = randn(rng, s, 3, 128, dtype=dtype, device=device)
    weight = random_weight(rng, 3, 512, 128, device)
    absorb_q.out(q_nope, *weight, q_out=q[..., :512])
    assert_same_bits(q[..., :512], absorb_q(q_nope, *weight))
    assert_same_bits(q[..., 512:], q_pe, "rope columns")


@pytest.mark.parametrize("s", [1, 2, 7])
def test_absorb_q_out_may_interleave_with_an_input(rng, device, dtype, s):
    buffer = randn(rng, s, 3, 256 + 128 + 64, dtype=dtype, device=device)
    q_nope = buffer[..., 256:384]
    weight = random_weight(rng, 3, 256, 128, device)
    before = buffer.clone()
    absorb_q.out(q_nope, *weight, q_out=buffer[..., :256])
    assert_same_bits(buffer[..., :256], absorb_q(before[..., 256:384], *weight))
    assert_same_bits(buffer[..., 256:], before[..., 256:], "columns beside the output")


def test_absorb_q_out_may_be_transposed_heads(rng, device, dtype):
    """Attention kernels take [H,S,...] too."""
    q_nope = randn(rng, 7, 3, 128, dtype=dtype, device=device)
    weight = random_weight(rng, 3, 512, 128, device)
    by_head = torch.full((3, 7, 512), float("nan"), dtype=dtype, device=device)
    absorb_q.out(q_nope, *weight, q_out=by_head.transpose(0, 1))
    assert_same_bits(by_head, absorb_q(q_nope, *weight).transpose(0, 1).contiguous())
