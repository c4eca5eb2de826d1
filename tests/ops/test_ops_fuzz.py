"""Any call of any op, as hypothesis draws it, against the reference: as many as `--fuzz-cases` says.

Op, extents, strides, dtypes, kinds of values, activations, options, views to write into, and on a GPU the stream or
graph are drawn. What a failure taught is a test with a name at the end.
"""

import calls
import pytest
import strategies
import torch
from cases import CASE, OPS
from helpers import assert_same_bits, assert_untouched_outside, bits
from hypothesis import event, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(scope="module")
def one_thread():
    """For what is small, the second thread of the reference costs more than the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def views_for(draw, call):
    """Poisoned views for the call's results in any layout, their buffers, and the part of each that is written."""
    views, buffers = [], []
    for name, result in zip(call.view_names, call.results(), strict=True):
        view, buffer = strategies.place(draw, result, free_last=name.startswith("scale"))
        views.append(view)
        buffers.append(buffer)
    written = [view[:, : view.shape[1] - call.unwritten_rows] for view in views]
    return tuple(views), buffers, written


@on_each_device
@settings.get_profile("fuzz")
@given(data=st.data())
def test_op_matches_reference_for_any_call(device, data):
    op = data.draw(st.sampled_from(list(calls.MAKERS)))
    mode = data.draw(st.sampled_from(list(calls.MODES[device])))
    call = calls.MAKERS[op](data.draw, device)
    views, buffers, written = views_for(data.draw, call) if data.draw(st.booleans()) else ((), [], [])
    event(f"{op} {mode} {'into views' if views else 'returned'}")
    before = {name: bits(x.contiguous()).clone() for name, x in call.arguments.items()}
    call.check(*calls.MODES[device][mode](call, views))
    for buffer, view in zip(buffers, written, strict=True):
        if mode != "graph":  # which fills the whole buffer again
            assert_untouched_outside(buffer, view)
    for name, x in call.arguments.items():
        assert torch.equal(bits(x.contiguous()), before[name]), f"{name} was written"


@on_each_device
@settings(max_examples=100)
@given(data=st.data(), q_nope=strategies.activations())
def test_absorb_q_has_the_bits_of_bmm_for_any_input(device, data, q_nope):
    q_nope = calls.on(device, q_nope.bfloat16())
    s, h, d = q_nope.shape
    weight = [calls.on(device, x) for x in data.draw(strategies.weights(h, d))]
    want = OPS.bmm(*OPS.quantize_q_nope(q_nope), *weight, m=s).transpose(0, 1)
    assert_same_bits(OPS.absorb_q(q_nope, *weight, fp8_activations=True), want)


@on_each_device
def test_absorb_q_infinite_rope_by_an_infinite_out_scale_is_nan(rng, device):
    """Found by drawing: Inf * (1 / Inf), which the formula makes NaN and a clamp that came first would make 448."""
    arguments = CASE["absorb_q-pe-fp8"].arguments(rng, 2, 1, device=device)
    arguments["q_pe"][0, 0, 3] = arguments["out_scale"][...] = calls.INF
    nan = OPS.absorb_q(**arguments).float().isnan()
    assert nan[0, 0, 512 + 3] and nan.sum() == 1
