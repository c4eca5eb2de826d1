"""The fakes say what the ops return, and the ops keep PyTorch's rules (torch.library.opcheck)."""

import helpers
import pytest
import torch
from cases import CASE, each_case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

# test_schema compares inputs by allclose, which has no float8: test_op_reads_its_inputs_only does it by bytes.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def metadata(results):
    return [(tuple(r.shape), r.stride(), r.dtype, r.device.type, r.storage_offset()) for r in results]


def faked(arguments, mode):
    return {name: mode.from_tensor(v) if torch.is_tensor(v) else v for name, v in arguments.items()}


@pytest.mark.parametrize("s", [0, 1, 2, 4, 7, 257])
@pytest.mark.parametrize("h", [1, 3])
@each_case
def test_op_fake_agrees(rng, device, dtype, case, s, h):
    arguments = case.arguments(rng, s, h, dtype, device)
    real = case.call(arguments)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = case.call(faked(arguments, mode))
        assert metadata(fake) == metadata(real)


@pytest.mark.parametrize("m_alignment", [1, 4, 128, 300])
@pytest.mark.parametrize("s", [0, 1, 5, 301])
def test_quantize_q_nope_fake_agrees_for_any_alignment(rng, device, s, m_alignment):
    case = CASE["quantize_q_nope"]
    arguments = case.arguments(rng, s, 2, device=device) | {"m_alignment": m_alignment, "zero_pad": False}
    real = case.call(arguments)
    with FakeTensorMode() as mode:
        assert metadata(case.call(faked(arguments, mode))) == metadata(real)


@each_case
def test_op_fake_takes_strided_inputs(rng, device, case):
    arguments = case.arguments(rng, 7, 3, device=device)
    for name in {"q_nope", "q_pe", "o_latent", "a"} & set(arguments):
        arguments[name] = helpers.laid_out(arguments[name], helpers.ROW_LAYOUTS["transposed"])
    real = case.call(arguments)
    with FakeTensorMode() as mode:
        assert metadata(case.call(faked(arguments, mode))) == metadata(real)


@each_case
def test_op_out_fake_agrees(rng, device, case):
    arguments = case.arguments(rng, 7, 3, device=device)
    views, _ = case.out_views(case.call(arguments))
    with FakeTensorMode() as mode:
        assert case.out(**faked(arguments, mode), **faked(views, mode)) is None


@each_case
def test_op_runs_on_meta_tensors(rng, case):
    arguments = case.arguments(rng, 7, 3)
    real = case.call(arguments)
    on_meta = {name: v.to("meta") if torch.is_tensor(v) else v for name, v in arguments.items()}
    results = case.call(on_meta)
    assert all(result.is_meta for result in results)
    assert [m[:3] for m in metadata(results)] == [m[:3] for m in metadata(real)]


@each_case
def test_op_keeps_the_rules_of_torch_library(rng, device, case):
    torch.library.opcheck(case.functional, (), case.arguments(rng, 7, 3, device=device), test_utils=CHECKS)


@each_case
def test_op_out_keeps_the_rules_of_torch_library(rng, device, case):
    arguments = case.arguments(rng, 7, 3, device=device)
    views, _ = case.out_views(case.call(arguments))
    torch.library.opcheck(case.out, (), arguments | views, test_utils=CHECKS)


@each_case
def test_op_schema_names_its_writes(case):
    written = {argument.name for argument in case.out._schema.arguments if argument.alias_info is not None}
    assert written == set(case.outs)
    assert not case.functional._schema.is_mutable and not case.out._schema.returns


def test_quantize_q_nope_schema_matches_what_it_does(rng, device):
    """No float8 goes in, so opcheck's own mutation check works here."""
    arguments = CASE["quantize_q_nope"].arguments(rng, 7, 3, device=device)
    torch.library.opcheck(CASE["quantize_q_nope"].functional, (), arguments, test_utils="test_schema")
