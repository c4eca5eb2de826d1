"""Extents and addresses that no model has: an error that says so, never a crash, a hang or a wrapped number."""

import re

import pytest
import torch
from cases import CASE, OPS, each_case
from helpers import E4M3, assert_same_bits, assert_untouched_outside
from test_ops_rejects import assert_rejected

HUGE_HEADS, MOST_ROWS, WIDEST = 2**20, 2**31 - 1, 16384
ADDRESS = "an address that is 1 bytes past one"


def repeated(shape, dtype):
    """A tensor of one element that is said to have a shape."""
    return torch.zeros(1, dtype=dtype).expand(shape)


def flat_row(s, h, k):
    return torch.zeros(1, 1, k, dtype=torch.bfloat16).expand(s, h, k)


def flat_weight(h, n, k):
    weight = torch.zeros(1, 1, k).to(E4M3).expand(h, n, k)
    return weight, repeated((h, n // 128, k // 128), torch.float32)


def assert_too_large(call, op, shape, dtype):
    shape = re.escape(str(list(shape)))
    rule = rf"the result must fit into the memory of cpu, got shape {shape} of {dtype} \(out of memory\)"
    assert_rejected(call, f"{op}: {rule}")


@pytest.mark.parametrize("s", [MOST_ROWS, 2**24])
def test_absorb_q_says_what_does_not_fit_into_memory(s):
    weight = flat_weight(HUGE_HEADS, WIDEST, 128)
    call = lambda: OPS.absorb_q(flat_row(s, HUGE_HEADS, 128), *weight)  # noqa: E731
    assert_too_large(call, "absorb_q", (s, HUGE_HEADS, WIDEST), "bfloat16")


def test_v_up_says_what_does_not_fit_into_memory():
    x = flat_row(MOST_ROWS, HUGE_HEADS, 128)
    weight, narrow = flat_weight(HUGE_HEADS, WIDEST, 128), flat_weight(HUGE_HEADS, 128, 128)
    assert_too_large(lambda: OPS.v_up(x, *weight), "v_up", (MOST_ROWS, HUGE_HEADS, WIDEST), "bfloat16")
    call = lambda: OPS.v_up_quantized(x, *narrow)  # noqa: E731
    assert_too_large(call, "v_up_quantized", (MOST_ROWS, HUGE_HEADS * 128), "float8_e4m3fn")


@pytest.mark.parametrize("s,h,m_alignment", [(MOST_ROWS, HUGE_HEADS, 1), (2**17, 2**38, 1), (1, 2**38, MOST_ROWS)])
def test_quantize_q_nope_says_what_does_not_fit_into_memory(s, h, m_alignment):
    call = lambda: OPS.quantize_q_nope(flat_row(s, h, 128), m_alignment=m_alignment)  # noqa: E731
    assert_too_large(call, "quantize_q_nope", (h, max(s, m_alignment), 128), "float8_e4m3fn")


def test_bmm_says_what_does_not_fit_into_memory():
    rows = 2**35
    a = torch.zeros(1, 1, 128).to(E4M3).expand(HUGE_HEADS, rows, 128)
    a_scale = repeated((HUGE_HEADS, rows, 1), torch.float32)
    weight = flat_weight(HUGE_HEADS, WIDEST, 128)
    assert_too_large(lambda: OPS.bmm(a, a_scale, *weight), "bmm", (HUGE_HEADS, rows, WIDEST), "bfloat16")


def misplaced(x, by=1):
    """The same values, `by` bytes past an aligned address, as in a mapped file or a foreign buffer."""
    memory = bytearray(x.numel() * x.element_size() + 64)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 16 + by
    view = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=start).view(x.shape)
    return view.copy_(x)


def misplaced_arguments():
    for case in CASE.values():
        arguments = case.arguments(torch.Generator(), 7, 3)
        for name, x in arguments.items():
            if torch.is_tensor(x) and x.element_size() > 1:
                yield case, name


MISPLACED = list(misplaced_arguments())


@pytest.mark.parametrize("case,name", MISPLACED, ids=[f"{case}-{name}" for case, name in MISPLACED])
def test_op_rejects_an_address_between_elements(rng, case, name):
    """A GPU would fault, and a CPU is free to."""
    arguments = case.arguments(rng, 7, 3)
    views, buffers = case.out_views(case.call(arguments))
    arguments[name] = misplaced(arguments[name])
    rule = f"start at a multiple of its element's {arguments[name].element_size()} bytes, got {ADDRESS}"
    for call in (lambda: case.functional(**arguments), lambda: case.out(**arguments, **views)):
        assert_rejected(call, f"{case.op}: {name} must {rule}")
    for buffer in buffers:
        assert_untouched_outside(buffer)


@each_case
def test_op_out_rejects_an_address_between_elements(rng, case):
    arguments = case.arguments(rng, 7, 3)
    results = case.call(arguments)
    views, _ = case.out_views(results)
    for name, result in zip(views, results, strict=True):
        if result.element_size() == 1:
            continue
        there = misplaced(torch.zeros(result.shape, dtype=result.dtype))
        rule = f"start at a multiple of its element's {result.element_size()} bytes, got {ADDRESS}"
        assert_rejected(lambda v=views | {name: there}: case.out(**arguments, **v), f"{case.op}: {name} must {rule}")
        assert not there.any()


@each_case
def test_op_takes_any_address_of_whole_elements(rng, case):
    """On a CPU, weights too may start anywhere."""
    arguments = case.arguments(rng, 7, 3)
    want = case.call(arguments)
    moved = {n: misplaced(x, x.element_size()) if torch.is_tensor(x) else x for n, x in arguments.items()}
    for got, expected in zip(case.call(moved), want, strict=True):
        assert_same_bits(got, expected)
