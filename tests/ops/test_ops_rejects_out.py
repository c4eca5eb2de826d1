"""A wrong view to write into is an error that names it, and nothing is written."""

import re

import helpers
import pytest
import torch
from cases import CASE, each_case
from faults import elsewhere, with_grad, with_last_stride_2
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_rejects import assert_rejected

OUTS = [(case, name) for case in CASE.values() if case.variant in ("", "pe-fp8") for name in case.outs]
each_out = pytest.mark.parametrize("case,name", OUTS, ids=[f"{case}-{name}" for case, name in OUTS])
SHAPE_FAULTS = {
    "one_row_more": lambda x: torch.cat([bits(x)] + [bits(x)[:1]]).view(x.dtype),
    "one_row_fewer": lambda x: x[:-1],
    "empty": lambda x: x[:0],
    "one_column_fewer": lambda x: x[..., :-1],
    "other_rank": lambda x: x[None],
    "flat": lambda x: x.reshape(-1),
    "dims_swapped": lambda x: x.transpose(0, 1).contiguous(),
}


def bits(x):
    return helpers.bits(x.contiguous())


def prepared(case, rng, device):
    arguments = case.arguments(rng, 7, 3, device=device)
    views, buffers = case.out_views(case.call(arguments))
    return arguments, views, buffers


def assert_out_rejected(case, name, arguments, views, buffers, rule):
    assert_rejected(lambda: case.out(**arguments, **views), f"{case.op}: {name} must {rule}")
    for buffer in buffers:
        helpers.assert_untouched_outside(buffer)


@pytest.mark.parametrize("fault", SHAPE_FAULTS)
@each_out
def test_op_out_rejects_a_wrong_shape(rng, device, case, name, fault):
    arguments, views, buffers = prepared(case, rng, device)
    right, views[name] = views[name].shape, SHAPE_FAULTS[fault](views[name])
    if views[name].shape == right:
        pytest.fail(f"{fault} leaves the shape as it was")
    want, got = (re.escape(str(list(shape))) for shape in (right, views[name].shape))
    assert_out_rejected(case, name, arguments, views, buffers, rf"have shape .* = {want}, got {got}")


@each_out
def test_op_out_rejects_a_wrong_dtype(rng, device, case, name):
    arguments, views, buffers = prepared(case, rng, device)
    right, views[name] = views[name].dtype, views[name].to(torch.float64)
    rule = f"be {str(right).removeprefix('torch.')}, got float64"
    assert_out_rejected(case, name, arguments, views, buffers, rule)


@pytest.mark.parametrize("case,name", [(c, n) for c, n in OUTS if not n.startswith("scale")], ids=str)
def test_op_out_rejects_a_last_stride_of_2(rng, device, case, name):
    arguments, views, buffers = prepared(case, rng, device)
    views[name] = with_last_stride_2(views[name])
    rule = r"have a contiguous last dim, got strides \[.*2\]"
    assert_out_rejected(case, name, arguments, views, buffers, rule)
    assert not views[name].float().any()


@each_out
def test_op_out_rejects_another_device(rng, device, case, name):
    arguments, views, buffers = prepared(case, rng, device)
    views[name] = elsewhere(views[name])
    rule = rf"be on the device of {next(iter(arguments))}, (cpu|cuda:0), got (meta|cpu)"
    assert_out_rejected(case, name, arguments, views, buffers, rule)


@each_out
def test_op_out_rejects_a_view_that_requires_grad(rng, device, case, name):
    arguments, views, buffers = prepared(case, rng, device)
    views[name] = with_grad(views[name])
    assert_out_rejected(case, name, arguments, views, buffers, "not require grad, .*, got requires_grad=True")


@pytest.mark.parametrize("dim", [0, 1])
@each_out
def test_op_out_rejects_an_expanded_view(rng, device, case, name, dim):
    arguments, views, buffers = prepared(case, rng, device)
    if dim == views[name].dim() - 1 and not name.startswith("scale"):
        dim = 0  # the last one must be contiguous
    views[name] = views[name].narrow(dim, 0, 1).expand(views[name].shape)
    rule = r"have each element in a place of its own, got shape \[.*\] with strides \[.*\]"
    assert_out_rejected(case, name, arguments, views, buffers, rule)


@each_out
def test_op_out_rejects_rows_that_share_one_element(rng, device, case, name):
    arguments, views, buffers = prepared(case, rng, device)
    shape = views[name].shape
    strides = list(helpers.contiguous_strides(shape))
    strides[0] -= 1
    views[name], buffer = helpers.strided(shape, strides, 0, views[name].dtype, device)
    rule = r"have each element in a place of its own, got .*"
    assert_out_rejected(case, name, arguments, views, [*buffers, buffer], rule)


def placed(tensors, offsets_bytes, device):
    """Contiguous copies of the tensors at these places of one byte buffer."""
    end = max(offset + t.numel() * t.element_size() for t, offset in zip(tensors, offsets_bytes, strict=True))
    memory = torch.full((end + helpers.GUARD,), helpers.POISON, dtype=torch.uint8, device=device)
    copies = []
    for tensor, offset in zip(tensors, offsets_bytes, strict=True):
        count = tensor.numel() * tensor.element_size()
        copies.append(memory[offset : offset + count].view(tensor.dtype).view(tensor.shape))
    return memory, copies


PAIRS = [(case, name, other) for case, name in OUTS
         for other in case.arguments(torch.Generator(), 1, 1)] + [  # every input, and the other output
         (CASE[op], "scale_out", "val_out") for op in ("quantize_q_nope", "v_up_quantized")]  # fmt: skip


@pytest.mark.parametrize("case,name,other", PAIRS, ids=[f"{c}-{n}-{o}" for c, n, o in PAIRS])
def test_op_out_rejects_an_overlap_by_its_first_bytes(rng, device, case, name, other):
    arguments, views, _ = prepared(case, rng, device)
    source = (views | arguments)[other]
    end = -(-source.numel() * source.element_size() // 4) * 4
    memory, (copy, out) = placed([source, views[name]], [0, end - 4], device)
    copy.copy_(source)
    (views if other in views else arguments)[other] = copy
    views[name] = out
    before = memory.clone()
    rule = rf"not overlap {other}, got shapes \[.*\] and \[.*\] that share memory"
    assert_rejected(lambda: case.out(**arguments, **views), f"{case.op}: {name} must {rule}")
    assert torch.equal(memory, before)


@pytest.mark.parametrize("case,name,other", PAIRS, ids=[f"{c}-{n}-{o}" for c, n, o in PAIRS])
def test_op_out_may_begin_where_another_tensor_ends(rng, device, case, name, other):
    arguments, views, _ = prepared(case, rng, device)
    want = dict(zip(views, case.call(arguments), strict=True))
    source = (views | arguments)[other]
    end = -(-source.numel() * source.element_size() // 4) * 4
    _, (copy, out) = placed([source, views[name]], [0, end], device)
    copy.copy_(source)
    (views if other in views else arguments)[other] = copy
    views[name] = out
    case.out(**arguments, **views)
    for written, view in views.items():
        helpers.assert_same_bits(view, want[written], written)


@each_case
def test_op_out_is_not_resized(rng, device, case):
    arguments, views, buffers = prepared(case, rng, device)
    name = next(iter(views))
    views[name] = views[name].new_empty(0)
    assert_out_rejected(case, name, arguments, views, buffers, r"have shape .*, got \[0\]")
    assert views[name].shape == (0,)


def places(tensor):
    """The bytes of each element."""
    index = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    first = index.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten() * tensor.element_size()
    return (first[:, None] + torch.arange(tensor.element_size())).flatten().tolist()


def is_nested(tensor):
    """Each stride steps over all that the smaller ones reach."""
    reached = 0
    for stride, extent in sorted((s, e) for s, e in zip(tensor.stride(), tensor.shape, strict=True) if e > 1):
        if stride <= reached:
            return False
        reached += stride * (extent - 1)
    return True


@settings(max_examples=300)
@given(
    extents=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
    in_strides=st.tuples(st.integers(0, 600), st.integers(0, 300)),
    out_strides=st.tuples(*[st.integers(0, 150)] * 3),
    in_offset=st.integers(0, 400),
    out_offset=st.integers(0, 400),
)
def test_op_out_rejects_every_layout_that_shares_bytes(extents, in_strides, out_strides, in_offset, out_offset):
    """scale_out of quantize_q_nope, whose strides are free, against every byte of q_nope. Far apart it is taken."""
    s, h, groups = extents
    memory = torch.zeros(8192, dtype=torch.uint8)
    q_nope = memory.view(torch.bfloat16).as_strided((s, h, groups * 128), (*in_strides, 1), in_offset)
    scale = memory.view(torch.float32).as_strided((h, s, groups), out_strides, out_offset)
    val = torch.empty(h, s, groups * 128, dtype=torch.float8_e4m3fn)
    written, read = places(scale), places(q_nope)
    shares = len(set(written)) < len(written) or bool(set(written) & set(read))
    apart = is_nested(scale) and (max(written) < min(read) or max(read) < min(written))
    call = lambda: torch.ops.mla_fp8.quantize_q_nope.out(q_nope, m_alignment=1, val_out=val, scale_out=scale)  # noqa: E731
    try:
        call()
    except RuntimeError:  # what the rule cannot tell apart is refused too, in the same words
        assert not apart
        assert_rejected(call, r"quantize_q_nope: scale_out must (not overlap q_nope|have each element in a place).*")
        assert not memory.any()
    else:
        assert not shares


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_op_out_may_be_a_part_beside_its_input(rng, device, dim):
    """The other rows, heads or columns of one tensor."""
    q_nope = helpers.randn(rng, 7, 3, 128, dtype=torch.bfloat16, device=device)
    weight = helpers.random_weight(rng, 3, 128, 128, device)
    want = torch.ops.mla_fp8.absorb_q(q_nope, *weight)
    part, out = torch.cat([torch.zeros_like(q_nope)] * 2, dim).chunk(2, dim)
    part.copy_(q_nope)
    torch.ops.mla_fp8.absorb_q.out(part, *weight, q_out=out)
    helpers.assert_same_bits(out, want)
    helpers.assert_same_bits(part, q_nope, "the part that is read")


def test_op_out_rejects_what_the_rule_cannot_tell_apart(rng, device):
    """Some heads and some columns of one tensor, beside the same columns of its other heads."""
    buffer = torch.zeros(7, 4, 192, dtype=torch.bfloat16, device=device)
    weight = helpers.random_weight(rng, 2, 128, 128, device)
    call = lambda: torch.ops.mla_fp8.absorb_q.out(buffer[:, :2, :128], *weight, q_out=buffer[:, 2:, :128])  # noqa: E731
    assert_rejected(call, r"absorb_q: q_out must not overlap q_nope, got shapes .* and .* that share memory")
