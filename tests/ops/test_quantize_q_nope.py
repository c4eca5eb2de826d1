"""quantize_q_nope is bit-equal to the reference, whatever the values and the layout."""

import pytest
import torch
from cases import OPS, SHAPES, each_shape
from helpers import (
    E4M3,
    POISON,
    ROW_LAYOUTS,
    SCALE_LAYOUTS,
    assert_same_bits,
    assert_untouched_outside,
    laid_out,
    rand,
    randn,
    strided,
)

from mla_fp8 import reference

quantize_q_nope = OPS.quantize_q_nope


def assert_matches_reference(q_nope, got=None, **options):
    val, scale = quantize_q_nope(q_nope, **options) if got is None else got
    want_val, want_scale = reference.quantize_q_nope(q_nope, **options)
    assert_same_bits(scale, want_scale, "q_scale")
    assert_same_bits(val, want_val, "q_val")


@each_shape
def test_quantize_q_nope_matches_reference(rng, device, dtype, s, h):
    assert_matches_reference(randn(rng, s, h, 128, dtype=dtype, device=device))


@pytest.mark.parametrize("k", [256, 384, 512, 7168])
@pytest.mark.parametrize("s", [0, 1, 65, 257])
def test_quantize_q_nope_matches_reference_for_wide_rows(rng, device, dtype, s, k):
    assert_matches_reference(randn(rng, s, 2, k, dtype=dtype, device=device))


@pytest.mark.parametrize("m_alignment", [1, 4, 128, 256, 300])
@pytest.mark.parametrize("s", [0, 1, 5, 64, 255, 301])
def test_quantize_q_nope_pads_to_m_alignment(rng, device, s, m_alignment):
    q_nope = randn(rng, s, 3, 256, dtype=torch.bfloat16, device=device)
    assert_matches_reference(q_nope, m_alignment=m_alignment)


@pytest.mark.parametrize("m_alignment", [1, 4, 5, 256])
@pytest.mark.parametrize("s,h,k", [(1, 1, 128), (1, 3, 256), (4, 1, 128), (5, 1, 512), (257, 3, 128)])
def test_quantize_q_nope_strides_are_as_documented(rng, device, s, h, k, m_alignment):
    val, scale = quantize_q_nope(randn(rng, s, h, k, dtype=torch.bfloat16, device=device), m_alignment=m_alignment)
    m = -(-s // m_alignment) * m_alignment
    ceil4_m = -(-m // 4) * 4
    assert val.shape == (h, m, k) and val.is_contiguous() and val.stride() == (m * k, k, 1)
    assert scale.shape == (h, m, k // 128) and scale.stride() == (ceil4_m * k // 128, 1, ceil4_m)


def test_quantize_q_nope_rounds_every_value_as_the_reference(device, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for order in (every, every.sort().values, every.nan_to_num(0, 0, 0).sort().values):
        assert_matches_reference(order.to(device).view(256, 2, 128), amax_floor=1e-30)


@pytest.mark.parametrize("largest", [448.0, 1.0, 0.73, 1e-3])
def test_quantize_q_nope_rounds_ties_as_the_reference(rng, device, dtype, largest):
    q_nope = (rand(rng, 64, 2, 128) * 2 - 1) * largest
    q_nope[..., 0] = largest  # a scale near a power of two puts many values near ties
    assert_matches_reference(q_nope.to(device, dtype))


def special_rows(dtype):
    info = torch.finfo(dtype)
    tiny, smallest = info.tiny, info.smallest_normal * info.eps
    return {
        "zeros": torch.zeros(128),
        "negative_zeros": torch.full((128,), -0.0),
        "outlier": torch.linspace(-1, 1, 128).index_fill(0, torch.tensor([77]), 3e4),
        "largest": torch.linspace(-info.max, info.max, 128, dtype=torch.float64),
        "subnormals": torch.linspace(-tiny, tiny, 128, dtype=torch.float64),
        "smallest": torch.full((128,), smallest, dtype=torch.float64),
        "below_floor": torch.linspace(-9e-5, 9e-5, 128),
        "nan": torch.ones(128).index_fill(0, torch.tensor([5]), float("nan")),
        "inf": torch.ones(128).index_fill(0, torch.tensor([127]), float("inf")),
        "negative_inf": torch.ones(128).index_fill(0, torch.tensor([0]), float("-inf")),
        "inf_and_nan": torch.ones(128).index_fill(0, torch.tensor([1]), float("inf")).index_fill(
            0, torch.tensor([2]), float("nan")),
    }  # fmt: skip


@pytest.mark.parametrize("amax_floor", [1e-4, 1e-12, 1e-30, 0.7])
@pytest.mark.parametrize("name", special_rows(torch.bfloat16))
def test_quantize_q_nope_matches_reference_on_special_rows(device, dtype, name, amax_floor):
    row = special_rows(dtype)[name].to(device, dtype)
    q_nope = torch.ones(9, 2, 256, dtype=dtype, device=device)
    q_nope[4, 1, 128:] = row
    assert_matches_reference(q_nope, amax_floor=amax_floor, m_alignment=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_quantize_q_nope_keeps_nan_and_inf_in_their_group(rng, device, dtype, value):
    clean = randn(rng, 9, 2, 256, dtype=dtype, device=device)
    dirty = clean.clone()
    dirty[4, 1, 200] = value
    (val, scale), (clean_val, clean_scale) = (quantize_q_nope(q, m_alignment=1) for q in (dirty, clean))
    assert val[1, 4, 200].float().isnan() and not scale[1, 4, 1].isfinite()
    group = torch.zeros_like(val, dtype=torch.bool)
    group[1, 4, 128:] = True
    merged = torch.where(group, clean_val.view(torch.uint8), val.view(torch.uint8)).view(E4M3)
    assert_same_bits(merged, clean_val, "q_val outside the group")
    scale[1, 4, 1] = clean_scale[1, 4, 1]
    assert_same_bits(scale, clean_scale, "q_scale outside the group")


def test_quantize_q_nope_scale_of_a_zero_row_is_the_floor(device, dtype):
    val, scale = quantize_q_nope(torch.zeros(1, 1, 128, dtype=dtype, device=device), m_alignment=1)
    floor = torch.tensor(1e-4, device=device)
    assert_same_bits(scale.flatten(), (floor / torch.full_like(floor, 448.0)).view(1), "q_scale")
    assert (val.view(torch.uint8) == 0).all()


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("s", [1, 2, 65, 257])
def test_quantize_q_nope_takes_strided_input(rng, device, dtype, layout, s):
    q_nope = laid_out(randn(rng, s, 3, 256, dtype=dtype, device=device), ROW_LAYOUTS[layout])
    assert_matches_reference(q_nope)


@pytest.mark.parametrize("dim", [0, 1])
def test_quantize_q_nope_takes_expanded_input(rng, device, dtype, dim):
    shape = [5, 3, 128]
    shape[dim] = 1
    assert_matches_reference(randn(rng, *shape, dtype=dtype, device=device).expand(5, 3, 128))


def out_buffers(h, m, k, device, val_layout="odd", scale_layout="odd"):
    val, val_buffer = strided((h, m, k), *ROW_LAYOUTS[val_layout](h, m, k), E4M3, device)
    shape = (h, m, k // 128)
    scale, scale_buffer = strided(shape, *SCALE_LAYOUTS[scale_layout](*shape), torch.float32, device)
    return val, val_buffer, scale, scale_buffer


@pytest.mark.parametrize("scale_layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("val_layout", ROW_LAYOUTS)
def test_quantize_q_nope_out_takes_strided_views(rng, device, dtype, val_layout, scale_layout):
    q_nope = randn(rng, 65, 3, 256, dtype=dtype, device=device)
    val, val_buffer, scale, scale_buffer = out_buffers(3, 128, 256, device, val_layout, scale_layout)
    quantize_q_nope.out(q_nope, m_alignment=128, val_out=val, scale_out=scale)
    assert_matches_reference(q_nope, (val, scale), m_alignment=128)
    assert_untouched_outside(val_buffer, val)
    assert_untouched_outside(scale_buffer, scale)


@pytest.mark.parametrize("s,h", [shape for shape in SHAPES if shape[0] < 1000])
def test_quantize_q_nope_without_zero_pad_leaves_rows_unwritten(rng, device, s, h):
    q_nope = randn(rng, s, h, 128, dtype=torch.bfloat16, device=device)
    m = -(-s // 128) * 128
    val, val_buffer, scale, scale_buffer = out_buffers(h, m, 128, device)
    quantize_q_nope.out(q_nope, m_alignment=128, zero_pad=False, val_out=val, scale_out=scale)
    want_val, want_scale = reference.quantize_q_nope(q_nope, m_alignment=128)
    assert_same_bits(val[:, :s], want_val[:, :s], "q_val")
    assert_same_bits(scale[:, :s], want_scale[:, :s], "q_scale")
    assert_untouched_outside(val_buffer, val[:, :s])
    assert_untouched_outside(scale_buffer, scale[:, :s])
    assert (val[:, s:].view(torch.uint8) == POISON).all()


def test_quantize_q_nope_without_zero_pad_returns_the_same_rows(rng, device, dtype):
    q_nope = randn(rng, 65, 3, 128, dtype=dtype, device=device)
    val, scale = quantize_q_nope(q_nope, zero_pad=False)
    want_val, want_scale = quantize_q_nope(q_nope)
    assert val.shape == want_val.shape and scale.stride() == want_scale.stride()
    assert_same_bits(val[:, :65], want_val[:, :65], "q_val")
    assert_same_bits(scale[:, :65], want_scale[:, :65], "q_scale")
