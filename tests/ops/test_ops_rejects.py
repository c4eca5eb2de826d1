"""A wrong input is an error that names op, argument, rule and value, before anything is written."""

import ctypes
import re

import helpers
import pytest
import torch
from cases import CASE, CASES, OF_ACTIVATIONS, each_case
from faults import FAULTS, with_grad

import mla_fp8

IDS = [str(fault) for fault in FAULTS]
DEVICE_FAULTS = [fault for fault in FAULTS if fault.name == "on_another_device"]


def assert_rejected(call, pattern):
    with pytest.raises(RuntimeError) as error:
        call()
    assert type(error.value) is RuntimeError, "none of its subclasses, as NotImplementedError is"
    for form in (pattern, r"[a-z_]+: [a-z_ ]+ must .+, got .+"):
        assert re.fullmatch(form, str(error.value).split("\n")[0]), f"{error.value!r} does not match {form!r}"


def spoiled(fault, rng, device):
    """The arguments before and after the fault."""
    arguments = CASE[fault.case].arguments(rng, 7, 3, device=device)
    return arguments, arguments | {fault.argument: fault.spoil(arguments.get(fault.argument))}


@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
def test_op_rejects(rng, device, fault):
    _, wrong = spoiled(fault, rng, device)
    assert_rejected(lambda: CASE[fault.case].functional(**wrong), fault.pattern())


@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
def test_op_out_rejects_and_leaves_its_views_unwritten(rng, device, fault):
    case = CASE[fault.case]
    arguments, wrong = spoiled(fault, rng, device)
    views, buffers = case.out_views(case.call(arguments))
    assert_rejected(lambda: case.out(**wrong, **views), fault.pattern())
    for buffer in buffers:
        helpers.assert_untouched_outside(buffer)


def names_of_events(calls) -> set[str]:
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        for call in calls:
            call()
    return {event.name for event in profile.events()}


def test_op_allocates_nothing_for_a_fault(rng):
    """What would be the result is not even made, whichever of the rules is broken."""
    calls = [(CASE[fault.case].functional, fault, spoiled(fault, rng, "cpu")) for fault in FAULTS]
    made = "[memory]"
    assert made in names_of_events(lambda op=op, right=right: op(**right) for op, _, (right, _) in calls[:1])
    rejected = names_of_events(
        lambda op=op, wrong=wrong, fault=fault: assert_rejected(lambda: op(**wrong), fault.pattern())
        for op, fault, (_, wrong) in calls
    )
    assert made not in rejected and any(name.startswith("mla_fp8::") for name in rejected)


def nodes_of_a_graph(call) -> int:
    """How many kernels and copies the call would have launched: a captured graph has each as a node."""
    graph, count = torch.cuda.CUDAGraph(keep_graph=True), ctypes.c_size_t()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        call()
        graph.capture_end()
    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count)) == 0
    return count.value


@pytest.mark.gpu
def test_op_launches_nothing_for_a_fault(rng):
    calls = [(CASE[fault.case], fault, spoiled(fault, rng, "cuda")) for fault in FAULTS]
    views = [case.out_views(case.call(right))[0] for case, _, (right, _) in calls]
    torch.cuda.synchronize()

    def reject_all():
        for (case, fault, (_, wrong)), out in zip(calls, views, strict=True):
            assert_rejected(lambda op=case.functional, a=wrong: op(**a), fault.pattern())
            assert_rejected(lambda op=case.out, a=wrong | out: op(**a), fault.pattern())

    case, _, (right, _) = calls[0]
    assert nodes_of_a_graph(lambda: case.functional(**right)) > 0
    assert nodes_of_a_graph(reject_all) == 0


@pytest.mark.parametrize("fault", DEVICE_FAULTS, ids=str)
def test_op_library_rejects_a_device_mix_without_python_fakes(rng, fault):
    """A C++ program has no fakes to catch a meta tensor, so the CPU function itself must refuse it."""
    _, wrong = spoiled(fault, rng, "cpu")
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    assert_rejected(
        lambda: CASE[fault.case].functional.redispatch(cpu, **wrong), fault.pattern().replace("(meta|cpu)", ".*")
    )


def test_op_faults_cover_every_argument():
    booleans = {"zero_pad", "fp8_activations"}
    for case in {case.op: case for case in CASES}.values():
        names = {argument.name for argument in case.functional._schema.arguments} - booleans
        assert names == {fault.argument for fault in FAULTS if fault.case.split("-")[0] == case.op}


@pytest.mark.parametrize("activations", ["bf16", "", None, True])
@pytest.mark.parametrize("op", OF_ACTIVATIONS)
def test_op_rejects_other_activations(rng, device, op, activations):
    arguments = CASE[op].arguments(rng, 7, 3, device=device)
    views, buffers = CASE[op].out_views(CASE[op].call(arguments))
    out = tuple(views.values()) if len(views) > 1 else next(iter(views.values()))
    rule = re.escape(f"{op}: activations must be 'exact' or 'fp8', got {activations!r}")
    for options in ({}, {"out": out}):
        assert_rejected(lambda o=options: getattr(mla_fp8, op)(**arguments, activations=activations, **o), rule)
    for buffer in buffers:
        helpers.assert_untouched_outside(buffer)


def test_op_faults_are_many():
    assert len(FAULTS) >= 60 and len(set(IDS)) == len(IDS)


def test_v_up_quantized_rejects_two_groups_a_head(rng, device):
    arguments = CASE["v_up_quantized"].arguments(rng, 7, 3, device=device)
    arguments["w_uv"], arguments["w_uv_scale"] = helpers.random_weight(rng, 3, 256, 512, device)
    pattern = r"v_up_quantized: w_uv must have V = 128, .*, got \[3, 256, 512\]"
    assert_rejected(lambda: CASE["v_up_quantized"].functional(**arguments), pattern)


@pytest.mark.parametrize("op", ["bmm", "absorb_q", "v_up", "v_up_quantized"])
def test_op_on_cuda_rejects_a_weight_address_that_is_not_a_multiple_of_16(rng, device, op):
    """Strides are ruled by the same check on both; the address matters to the tensor maps of CUDA only."""
    case, name = CASE[op], {"bmm": "b", "absorb_q": "w_uk"}.get(op, "w_uv")
    arguments = case.arguments(rng, 7, 3, device=device)
    weight = arguments[name]
    view, _ = helpers.strided(weight.shape, weight.stride(), 8, weight.dtype, device)
    arguments[name] = view.copy_(weight)
    if device == "cpu":
        case.functional(**arguments)
    else:
        pattern = rf"{op}: {name} must start at a multiple of 16 bytes, got an address that is 8 bytes past one"
        assert_rejected(lambda: case.functional(**arguments), pattern)


def gradients(arguments):
    return {name: with_grad(v) if torch.is_tensor(v) else v for name, v in arguments.items()}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@each_case
def test_op_accepts_gradients_without_grad_mode(rng, device, case, mode):
    arguments = case.arguments(rng, 7, 3, device=device)
    want = case.call(arguments)
    views, _ = case.out_views(want)
    with mode():
        case.assert_gives(gradients(arguments), views, want)


@each_case
def test_op_accepts_detached_tensors(rng, device, case):
    arguments = case.arguments(rng, 7, 3, device=device)
    detached = {n: v.detach() if torch.is_tensor(v) else v for n, v in gradients(arguments).items()}
    for got, want in zip(case.call(detached), case.call(arguments), strict=True):
        helpers.assert_same_bits(got, want)


@each_case
def test_op_compiled_rejects_a_gradient(rng, device, case):
    arguments = case.arguments(rng, 7, 3, device=device)
    first = next(iter(arguments))
    arguments[first] = with_grad(arguments[first])
    compiled = torch.compile(lambda **kwargs: case.functional(**kwargs), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=rf"{case.op}: {first} must not require grad"):
        compiled(**arguments)


@each_case
def test_op_rejects_tensors_that_it_has_no_kernel_for(rng, case):
    """Sparse and quantized tensors have no strides: the dispatcher refuses them before the op is reached."""
    arguments = case.arguments(rng, 7, 3)
    first = next(iter(arguments))
    arguments[first] = arguments[first].float().to_sparse()
    with pytest.raises((NotImplementedError, RuntimeError), match=case.op):
        case.functional(**arguments)


@pytest.mark.parametrize(
    ("name", "argument", "value", "text"),
    [
        ("absorb_q-pe", "out_scale", 0.5, "got float 0.5: torch.tensor([scale], device=...) is one"),
        ("v_up", "out_scale", 2, "got int 2: torch.tensor([scale], device=...) is one"),
        ("absorb_q-pe", "q_nope", [1.0], "got list [1.0]"),
        ("v_up", "w_uv_scale", [[1.0]], "got list [[1.0]]"),
        ("v_up_quantized", "o_latent", None, None),
        ("bmm", "b", "b", "got str 'b'"),
        ("quantize_q_nope", "q_nope", 1, "got int 1"),
    ],
)
def test_op_names_an_argument_that_is_no_tensor(rng, name, argument, value, text):
    arguments = CASE[name].arguments(rng, 7, 3) | {argument: value}
    op = name.split("-")[0]
    with pytest.raises(RuntimeError) as raised:
        getattr(mla_fp8, op)(**arguments)
    if text is not None:  # None for a tensor that must be there has torch's own text
        assert str(raised.value).startswith(f"{op}: {argument} must be a Tensor, {text}")
