"""Compiled and exported programs give the eager bits, for every number of tokens, without compiling again."""

import re

import helpers
import pytest
import torch
from cases import CASE, OPS, each_case
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

# torch.compile specializes on 0 and 1, so those compile once more. 6 comes first because neither it nor ceil4(6) equals
# another extent: Dynamo takes equal extents of a first call for the same one.
TOKENS = (6, 2, 3, 64, 300)
# Inductor asks whether an output is dense, and v_scale with strides (1, ceil4(S)) is where S is a multiple of 4.
MOST_COMPILES_WITH_V_SCALE = 2
# What does work in a program that Inductor wrote: an op, or a kernel of its own.
WORK = re.compile(r"torch\.ops\.[\w.]+\(|\baten\.[\w.]+\(|extern_kernels\.\w+\(|\w+_fused_\w+")
RUNS = {"cuda": 3, "cpu": 1}  # of reduce-overhead, which on a GPU warms up, records a CUDA graph, replays it


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        assert g.stride() == w.stride()
        helpers.assert_same_bits(g, w)


@each_case
def test_op_compiled_gives_the_eager_bits(rng, device, case):
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda **arguments: case.functional(**arguments), fullgraph=True, dynamic=True,
                             backend=backend)  # fmt: skip
    for s in TOKENS:
        arguments = case.arguments(rng, s, 3, device=device)
        got = compiled(**arguments)
        assert_same(got if isinstance(got, tuple) else (got,), case.call(arguments))
    assert backend.frame_count <= (MOST_COMPILES_WITH_V_SCALE if case.op == "v_up_quantized" else 1)


def assert_writes_the_eager_bits(compiled, rng, device, case, s):
    arguments = case.arguments(rng, s, 3, device=device)
    want = case.call(arguments)
    views, buffers = case.out_views(want)
    compiled(**arguments, **views)
    for view, buffer, expected in zip(views.values(), buffers, want, strict=True):
        helpers.assert_same_bits(view, expected)
        helpers.assert_untouched_outside(buffer, view)


@each_case
def test_op_out_compiled_gives_the_eager_bits(rng, device, case):
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda **arguments: case.out(**arguments), fullgraph=True, dynamic=True, backend=backend)
    for s in TOKENS:
        assert_writes_the_eager_bits(compiled, rng, device, case, s)
    assert backend.frame_count == 1


@pytest.mark.parametrize("s", [0, 1])
@each_case
def test_op_compiled_takes_edge_sizes(rng, device, case, s):
    compiled = torch.compile(lambda **arguments: case.functional(**arguments), fullgraph=True, dynamic=True,
                             backend="aot_eager")  # fmt: skip
    for tokens in (5, s):
        arguments = case.arguments(rng, tokens, 3, device=device)
        got = compiled(**arguments)
        assert_same(got if isinstance(got, tuple) else (got,), case.call(arguments))


@each_case
def test_op_compiled_with_reduce_overhead_gives_the_eager_bits(rng, device, case):
    counters.clear()
    compiled = torch.compile(lambda **arguments: case.functional(**arguments), fullgraph=True, dynamic=True,
                             mode="reduce-overhead")  # fmt: skip
    for s in (*TOKENS, 1, 0):
        for _ in range(RUNS[device]):
            arguments = case.arguments(rng, s, 3, device=device)
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(**arguments)
            assert_same(got if isinstance(got, tuple) else (got,), case.call(arguments))
    if device == "cuda":
        assert counters["inductor"]["cudagraph_skips"] == 0


@each_case
def test_op_out_compiled_with_reduce_overhead_gives_the_eager_bits(rng, device, case):
    """Inductor makes no CUDA graph of a graph that writes to its inputs: bits and no more are what this mode gives."""
    counters.clear()
    compiled = torch.compile(lambda **arguments: case.out(**arguments), fullgraph=True, dynamic=True,
                             mode="reduce-overhead")  # fmt: skip
    for s in TOKENS:
        for _ in range(RUNS[device]):
            assert_writes_the_eager_bits(compiled, rng, device, case, s)
    if device == "cuda":
        assert counters["inductor"]["cudagraph_skips"] >= 1


def compiled_body(function, *arguments):
    """The calls that Inductor writes for `function`, as Python text."""
    with torch._inductor.config.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(torch.compile(function, fullgraph=True, dynamic=True), *arguments)
    return code[code.index("def call(") : code.index("return (", code.index("def call("))]


def assert_only_writes(case, body, allocations):
    """Nothing runs but the writing overload, and no memory is allocated but `allocations` buffers."""
    assert WORK.findall(body) == [f"torch.ops.mla_fp8.{case.op}.out("]
    assert len(re.findall(r"\bempty\w*\(", body)) == allocations


@each_case
def test_op_out_compiled_writes_to_its_views_without_a_copy(rng, device, case):
    arguments = case.arguments(rng, 6, 3, device=device)
    views, _ = case.out_views(case.call(arguments))
    body = compiled_body(lambda arguments, views: case.out(**arguments, **views), arguments, views)
    assert_only_writes(case, body, allocations=0)


@each_case
def test_op_out_compiled_writes_into_a_buffer_of_its_graph_without_a_copy(rng, device, case):
    """The buffer is wider than the output, as q is beside its rope columns; functionalization is undone in place."""

    def program(arguments, like):
        buffers = [x.new_empty(*x.shape[:-1], x.shape[-1] + 64) for x in like]
        views = [buffer[..., : x.shape[-1]] for buffer, x in zip(buffers, like, strict=True)]
        case.out(**arguments, **dict(zip(case.outs, views, strict=True)))
        return buffers

    arguments = case.arguments(rng, 6, 3, device=device)
    body = compiled_body(program, arguments, case.call(arguments))
    assert_only_writes(case, body, allocations=len(case.outs))


class Decode(torch.nn.Module):
    """A whole step around attention: the three published ops, and the fused ones into views of one buffer."""

    def forward(self, q, o_latent, w_uk, w_uk_scale, w_uv, w_uv_scale):
        q_nope, q_pe = q.split([128, 64], dim=-1)
        q_val, q_scale = OPS.quantize_q_nope(q_nope)
        published = OPS.bmm(q_val, q_scale, w_uk, w_uk_scale, m=q.shape[0]).transpose(0, 1)
        attention_q = q.new_empty(q.shape[0], q.shape[1], 576)
        OPS.absorb_q.out(q_nope, w_uk, w_uk_scale, q_out=attention_q[..., :512])
        attention_q[..., 512:] = q_pe
        v_val, v_scale = OPS.v_up_quantized(o_latent, w_uv, w_uv_scale)
        v_of_fp8 = OPS.v_up(o_latent, w_uv, w_uv_scale, fp8_activations=True)
        return published, attention_q, v_val, v_scale, OPS.v_up(o_latent, w_uv, w_uv_scale), v_of_fp8


def decode_arguments(rng, s, device):
    absorb, up = (CASE[name].arguments(rng, s, 3, device=device) for name in ("absorb_q", "v_up"))
    q = helpers.randn(rng, s, 3, 192, dtype=torch.bfloat16, device=device)
    return (q, up["o_latent"], absorb["w_uk"], absorb["w_uk_scale"], up["w_uv"], up["w_uv_scale"])


def test_ops_compiled_together_give_the_eager_bits(rng, device):
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(Decode(), fullgraph=True, dynamic=True, backend=backend)
    for s in TOKENS:
        arguments = decode_arguments(rng, s, device)
        assert_same(compiled(*arguments), Decode()(*arguments))
    assert backend.frame_count <= MOST_COMPILES_WITH_V_SCALE


def test_ops_compiled_with_marked_dynamic_tokens_do_not_recompile(rng, device):
    compiled = torch.compile(Decode(), fullgraph=True, backend="aot_eager")
    for s in TOKENS:
        arguments = decode_arguments(rng, s, device)
        for tensor in arguments[:2]:
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch._dynamo.config.patch(error_on_recompile=s != TOKENS[0]):
            assert_same(compiled(*arguments), Decode()(*arguments))


@pytest.mark.parametrize("s", [0, 1, 2, 300])
def test_ops_exported_take_any_number_of_tokens(rng, device, s):
    tokens = torch.export.Dim("tokens", min=0, max=4096)
    shapes = ({0: tokens}, {0: tokens}, None, None, None, None)
    exported = torch.export.export(Decode(), decode_arguments(rng, 7, device), dynamic_shapes=shapes).module()
    arguments = decode_arguments(rng, s, device)
    assert_same(exported(*arguments), Decode()(*arguments))


@each_case
def test_op_exported_gives_the_eager_bits(rng, device, case):
    class Program(torch.nn.Module):
        def forward(self, arguments):
            results = case.functional(**arguments)
            return results if isinstance(results, tuple) else (results,)

    tokens = torch.export.Dim("tokens", min=0, max=4096)
    dims = {"q_nope": 0, "q_pe": 0, "o_latent": 0, "a": 1, "a_scale": 1}
    arguments = case.arguments(rng, 8, 3, device=device)
    arguments.pop("m", None)
    shapes = {"arguments": {name: {dims[name]: tokens} if name in dims else None for name in arguments}}
    exported = torch.export.export(Program(), (arguments,), dynamic_shapes=shapes).module()
    for s in (0, 1, 4, 300):
        arguments = case.arguments(rng, s, 3, device=device)
        arguments.pop("m", None)
        assert_same(exported(arguments), case.call(arguments))
