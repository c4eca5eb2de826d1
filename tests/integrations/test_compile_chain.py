"""A whole decode layer around the ops compiles into one graph: examples/compile_layer.py, and what it cannot show."""

import copy
import os
import sys
from pathlib import Path

import helpers
import processes
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mla_fp8

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))
from compile_layer import BF16_NOISE, DecodeLayer, inputs  # noqa: E402

HEADS, HIDDEN = 3, 256
TOKENS = (6, 2, 3, 64, 300)  # none equals another extent, which a first call would take for the same one
# FP8 values that a last bit of q or o_latent rounds the other way are off by the noise of FP8 at most.
NOISE = {"exact": BF16_NOISE, "fp8": helpers.FP8_FROBENIUS}
RUNS_TO_REPLAY = 3  # reduce-overhead warms up, records a CUDA graph, replays it


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture(params=NOISE)
def layer(request, device):
    return DecodeLayer(HEADS, HIDDEN, request.param).to(device)


def dynamic_inputs(tokens, device):
    arguments = inputs(tokens, HIDDEN, device)
    for argument in arguments:
        torch._dynamo.mark_dynamic(argument, 0)
    return arguments


def assert_within_noise(layer, got, want):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    helpers.assert_frobenius(got, want, NOISE[layer.activations])


def test_layer_hands_on_its_activations(device):
    """The two modes are two results of one layer, and one graph each."""
    exact, arguments = DecodeLayer(HEADS, HIDDEN).to(device), inputs(6, HIDDEN, device)
    fp8 = copy.deepcopy(exact)
    fp8.activations = "fp8"
    eager = [module(*arguments) for module in (exact, fp8)]
    compiled = [torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments) for module in (exact, fp8)]
    for got, want in zip(compiled, eager, strict=True):
        helpers.assert_same_bits(got, want)
    assert not torch.equal(*eager)


def test_layer_has_no_graph_break(layer, device):
    explained = torch._dynamo.explain(layer)(*inputs(6, HIDDEN, device))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_layer_captured_gives_the_eager_bits(layer, device):
    """aot_eager runs the captured, functionalized graph op by op, so that nothing is rounded elsewhere."""
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for s in TOKENS:
        arguments = dynamic_inputs(s, device)
        with torch.compiler.set_stance("default" if s == TOKENS[0] else "fail_on_recompile"):
            helpers.assert_same_bits(compiled(*arguments), layer(*arguments))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_layer_compiled_stays_within_noise(layer, device, mode):
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for s in TOKENS:
        with torch.compiler.set_stance("default" if s == TOKENS[0] else "fail_on_recompile"):
            for _ in range(RUNS_TO_REPLAY):
                arguments = dynamic_inputs(s, device)
                torch.compiler.cudagraph_mark_step_begin()
                assert_within_noise(layer, compiled(*arguments), layer(*arguments))


@pytest.mark.parametrize("s", [0, 1])
def test_layer_compiled_takes_edge_sizes(layer, device, s):
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    arguments = inputs(s, HIDDEN, device)
    assert_within_noise(layer, compiled(*arguments), layer(*arguments))


@pytest.mark.parametrize("activations", NOISE)
def test_v_up_quantized_compiled_with_its_consumer_compiles_once(rng, device, activations):
    """Only where v_scale leaves the graph does Inductor ask whether it is dense, and compile again for S = 4, 8."""

    def program(o_latent, w_uv, w_uv_scale):
        v_val, v_scale = mla_fp8.v_up_quantized(o_latent, w_uv, w_uv_scale, activations=activations)
        return v_val.float().unflatten(1, (-1, 128)) * v_scale.unsqueeze(-1)

    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend=backend)
    w_uv, w_uv_scale = helpers.random_weight(rng, HEADS, 128, 512, device)
    for s in (*TOKENS, 4, 8):
        o_latent = helpers.randn(rng, s, HEADS, 512, dtype=torch.bfloat16, device=device)
        arguments = (o_latent, w_uv, w_uv_scale)
        helpers.assert_same_bits(compiled(*arguments), program(*arguments))
    assert backend.frame_count == 1


def test_example_compile_layer_runs(device):
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    command = [sys.executable, EXAMPLES / "compile_layer.py"]
    result = processes.run(command, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f" on {device}: compiled against eager") == 4
