"""Each op against the reference, over shapes, strides and values that hypothesis chooses."""

import pytest
import strategies
import torch
from cases import OPS
from helpers import SCALE_LAYOUTS, SUM_ERROR, assert_rounded, assert_same_bits, exact_product, laid_out
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_fp8 import reference

INF = float("inf")
FINITE = tuple(kind for kind in strategies.KINDS if kind not in ("nan", "inf"))
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
out_scales = st.sampled_from([None, 2.0**-9, 0.01, 1.0, 37.0])


def on(device, *tensors):
    """The tensors there, with their strides and what lies between their rows."""
    moved = tuple(
        torch.empty(0, dtype=x.dtype)
        .set_(x.untyped_storage())
        .to(device)
        .as_strided(x.shape, x.stride(), x.storage_offset())
        for x in tensors
    )
    return moved[0] if len(moved) == 1 else moved


def product(x, weight):
    """The exact product of the quantized rows, and the error of an fp32 sum: infinite where it may overflow."""
    exact, error = exact_product(*reference.quantize(x), *weight)
    return exact, torch.where(error > torch.finfo(torch.float32).max * SUM_ERROR[x.device.type], INF, error)


@on_each_device
@settings(max_examples=200)
@given(
    q_nope=strategies.activations(),
    m_alignment=st.sampled_from([1, 3, 4, 64, 128, 256]),
    amax_floor=st.sampled_from([1e-4, 1e-12, 1e-30, 3.0]),
)
def test_quantize_q_nope_matches_reference_for_any_input(device, q_nope, m_alignment, amax_floor):
    q_nope = on(device, q_nope)
    val, scale = OPS.quantize_q_nope(q_nope, m_alignment=m_alignment, amax_floor=amax_floor)
    want_val, want_scale = reference.quantize_q_nope(q_nope, m_alignment, amax_floor)
    assert_same_bits(scale, want_scale, "q_scale")
    assert_same_bits(val, want_val, "q_val")


@on_each_device
@settings(max_examples=120)
@given(data=st.data(), q_nope=strategies.activations(), out_scale=out_scales, rope=st.sampled_from([0, 16, 48, 64]))
def test_absorb_q_matches_reference_for_any_input(device, data, q_nope, out_scale, rope):
    q_nope = on(device, q_nope)
    s, h, d = q_nope.shape
    weight = on(device, *data.draw(strategies.weights(h, d)))
    out_scale = None if out_scale is None else torch.tensor(out_scale, device=device)
    q_pe = q_nope[..., :rope] if rope else None
    exact, error = product(q_nope, weight)
    if rope:
        exact, error = torch.cat([exact, q_pe.double()], -1), torch.nn.functional.pad(error, (0, rope))
    got = OPS.absorb_q(q_nope, *weight, q_pe, out_scale)
    rounding = (lambda x: x.to(q_nope.dtype)) if out_scale is None else (lambda x: reference.to_fp8(x, out_scale))
    assert_rounded(got, exact, error, rounding)


@on_each_device
@settings(max_examples=100)
@given(data=st.data(), q_nope=strategies.activations())
def test_absorb_q_has_the_bits_of_bmm_for_any_input(device, data, q_nope):
    q_nope = on(device, q_nope.bfloat16())
    s, h, d = q_nope.shape
    weight = on(device, *data.draw(strategies.weights(h, d)))
    want = OPS.bmm(*OPS.quantize_q_nope(q_nope), *weight, m=s).transpose(0, 1)
    assert_same_bits(OPS.absorb_q(q_nope, *weight), want)


@on_each_device
@settings(max_examples=100)
@given(data=st.data(), x=strategies.activations(kinds=FINITE), layout=st.sampled_from(list(SCALE_LAYOUTS)))
def test_bmm_matches_reference_for_any_input(device, data, x, layout):
    x = on(device, x)
    s, h, k = x.shape
    a, a_scale = reference.quantize_q_nope(x, m_alignment=1)
    b, b_scale = on(device, *data.draw(strategies.weights(h, k)))
    m = data.draw(st.integers(0, s))
    got = OPS.bmm(a, laid_out(a_scale, SCALE_LAYOUTS[layout]), b, b_scale, m=m)
    exact, error = product(x[:m], (b, b_scale))
    assert_rounded(got.transpose(0, 1), exact, error, lambda x: x.bfloat16())


@on_each_device
@settings(max_examples=100)
@given(data=st.data(), o_latent=strategies.activations(), out_scale=out_scales)
def test_v_up_matches_reference_for_any_input(device, data, o_latent, out_scale):
    o_latent = on(device, o_latent)
    weight = on(device, *data.draw(strategies.weights(o_latent.shape[1], o_latent.shape[2])))
    out_scale = None if out_scale is None else torch.tensor(out_scale, device=device)
    exact, error = product(o_latent, weight)
    got = OPS.v_up(o_latent, *weight, out_scale)
    rounding = (lambda x: x.to(o_latent.dtype)) if out_scale is None else (lambda x: reference.to_fp8(x, out_scale))
    assert_rounded(got, exact, error, rounding)


@on_each_device
@settings(max_examples=100)
@given(data=st.data(), o_latent=strategies.activations())
def test_v_up_quantized_is_the_reference_quantization_of_its_product(device, data, o_latent):
    o_latent = on(device, o_latent)
    s, h, r = o_latent.shape
    weight = on(device, *data.draw(strategies.weights(h, r, n=128)))
    val, scale = OPS.v_up_quantized(o_latent, *weight)
    exact, error = product(o_latent, weight)
    rounding = lambda x: reference.to_fp8(x, scale.unsqueeze(-1))  # noqa: E731
    assert_rounded(val.view(s, h, 128), exact, torch.where(scale.unsqueeze(-1).isfinite(), error, INF), rounding)
    floor, fp8_max = (torch.tensor(x, device=device) for x in (reference.AMAX_FLOOR, reference.FP8_MAX))
    amax, amax_error = exact.abs().amax(-1), error.amax(-1)
    assert_rounded(scale, amax, amax_error, lambda x: torch.maximum(x.float(), floor) / fp8_max)
