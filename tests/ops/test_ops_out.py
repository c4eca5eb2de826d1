"""What holds for every overload that writes into given views, and for the public functions over them."""

import copy

import helpers
import pytest
import torch
from cases import CASE, OF_ACTIVATIONS, each_case

import mla_fp8

EXACT = {"activations": "exact"}


def snapshot(arguments):
    return {
        name: helpers.bits(value.contiguous()).clone() if isinstance(value, torch.Tensor) else copy.copy(value)
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("s,h", [(0, 2), (1, 1), (7, 3), (65, 2)])
@each_case
def test_op_out_fills_its_views_and_nothing_else(rng, device, dtype, case, s, h):
    arguments = case.arguments(rng, s, h, dtype, device)
    results = case.call(arguments)
    views, buffers = case.out_views(results)
    assert case.out(**arguments, **views) is None
    for view, buffer, want in zip(views.values(), buffers, results, strict=True):
        helpers.assert_same_bits(view, want)
        helpers.assert_untouched_outside(buffer, view)


@each_case
def test_op_reads_its_inputs_only(rng, device, dtype, case):
    """opcheck's schema check cannot compare float8, so this compares the inputs' bytes."""
    arguments = case.arguments(rng, 65, 3, dtype, device)
    before = snapshot(arguments)
    views, _ = case.out_views(case.call(arguments))
    case.out(**arguments, **views)
    for name, value in snapshot(arguments).items():
        same = torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]
        assert same, f"{name} was changed"


@each_case
def test_op_returns_fresh_memory(rng, device, case):
    arguments = case.arguments(rng, 7, 3, device=device)
    tensors = [*case.call(arguments), *case.call(arguments), *(v for v in arguments.values() if torch.is_tensor(v))]
    addresses = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    assert len(set(addresses)) == len(addresses)


def odd_where_1(x, stride):
    """The same tensor with that stride in every outer dim of extent 1, which torch gives freely."""
    strides = [stride if extent == 1 else old for extent, old in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return x.as_strided(x.shape, (*strides, x.stride(-1)), x.storage_offset())


@pytest.mark.parametrize("stride", [0, 1, 7, 10**6])
@each_case
def test_op_takes_any_stride_where_an_extent_is_1(rng, device, case, stride):
    arguments = case.arguments(rng, 1, 1, device=device)
    want = case.call(arguments)
    odd = {n: odd_where_1(v, stride) if torch.is_tensor(v) and v.dim() == 3 else v for n, v in arguments.items()}
    views = {n: odd_where_1(torch.full_like(r, float("nan")), stride) for n, r in zip(case.outs, want, strict=True)}
    case.out(**odd, **views)
    for got, view, expected in zip(case.call(odd), views.values(), want, strict=True):
        helpers.assert_same_bits(got, expected)
        helpers.assert_same_bits(view, expected)


def public(arguments):
    """The arguments by the names of the public functions."""
    given = dict(arguments)
    return given | ({"activations": "fp8"} if given.pop("fp8_activations", False) else {})


@each_case
def test_op_public_function_calls_the_op(rng, device, case):
    arguments = case.arguments(rng, 7, 3, device=device)
    results = getattr(mla_fp8, case.op)(**public(arguments))
    results = results if isinstance(results, tuple) else (results,)
    for got, want in zip(results, case.call(arguments), strict=True):
        helpers.assert_same_bits(got, want)


@each_case
def test_op_public_function_writes_into_out(rng, device, case):
    arguments = case.arguments(rng, 7, 3, device=device)
    results = case.call(arguments)
    views, _ = case.out_views(results)
    out = tuple(views.values()) if len(views) > 1 else next(iter(views.values()))
    assert getattr(mla_fp8, case.op)(**public(arguments), out=out) is out
    for view, want in zip(views.values(), results, strict=True):
        helpers.assert_same_bits(view, want)


@pytest.mark.parametrize("op", OF_ACTIVATIONS)
def test_op_public_function_keeps_activations_exact(rng, device, op):
    """By default; and the two differ."""
    arguments = CASE[op].arguments(rng, 7, 3, device=device)
    default, exact, fp8 = (getattr(mla_fp8, op)(**arguments, **o) for o in ({}, EXACT, {"activations": "fp8"}))
    first = (lambda results: results[0]) if isinstance(default, tuple) else (lambda results: results)
    helpers.assert_same_bits(first(default), first(exact))
    assert not torch.equal(helpers.bits(first(default)), helpers.bits(first(fp8)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@each_case
def test_op_runs_without_grad_mode(rng, device, case, mode):
    arguments = case.arguments(rng, 7, 3, device=device)
    want = case.call(arguments)
    views, _ = case.out_views(want)
    with mode():
        case.assert_gives(arguments, views, want)


@each_case
def test_op_results_do_not_require_grad(rng, device, case):
    assert not any(result.requires_grad for result in case.call(case.arguments(rng, 7, 3, device=device)))
