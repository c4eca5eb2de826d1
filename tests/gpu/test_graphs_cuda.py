"""The ops in CUDA graphs: a first call that is captured, and a decode step replayed until something would give."""

import helpers
import pytest
import torch
from cases import OPS
from product_inputs import HEAD_DIM, LATENT, ROPE_DIM, make_absorb_weight, make_v_weight
from test_attention import BOUND, exact

from mla_fp8.attention import attend_latents

pytestmark = pytest.mark.gpu

REPLAYS, CHECK_EVERY = 10_000, 1_000
# Both divide CHECK_EVERY: inputs and the place in the cache come round again, and so must every result.
INPUTS, CONTEXT = 8, 200
SCALE = (HEAD_DIM + ROPE_DIM) ** -0.5
HEADS = 128  # as many as the weights of product_inputs have

FIRST_CALL = """
    import torch
    from cases import CASE
    from helpers import assert_same_bits
    from mla_fp8 import jit

    case = CASE[{name!r}]

    def inputs(seed):
        return case.arguments(torch.Generator().manual_seed(seed), s=65, h=16, device="cuda")

    arguments = inputs(0)
    torch.cuda.synchronize()

    def capture():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = case.call(arguments)
        return graph, results

    refused = ""
    try:
        graph, results = capture()
    except RuntimeError as error:
        refused = str(error)
        assert refused.startswith(case.op + ": ") and "mla_fp8.jit.warm_up()" in refused, refused
        jit.warm_up()
        graph, results = capture()
    assert bool(refused) == bool(jit._images), "refused exactly where kernels must be compiled"
    for seed in (1, 2, 0):
        for name, value in inputs(seed).items():
            if torch.is_tensor(value):
                arguments[name].copy_(value)
        graph.replay()
        for got, want in zip(results, case.call(arguments), strict=True):
            assert_same_bits(got, want)
"""


@pytest.mark.parametrize("name", ["absorb_q-pe", "absorb_q-pe-one_term", "v_up", "v_up_quantized", "bmm"])
def test_op_graph_capture_may_be_the_first_call(run_python, name):
    """With embedded kernels. Without them the error names the warm-up, which then makes the capture work."""
    run_python(FIRST_CALL.format(name=name))


class DecodeStep:
    """Static buffers, and one step on them: each call takes the next inputs and writes the next place of the cache."""

    def __init__(self, absorb_weight, v_weight, s):
        self.weights, self.s = (absorb_weight, v_weight), s
        options = {"device": "cuda", "dtype": torch.bfloat16}
        self.step = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.queries = torch.randn(INPUTS, s, HEADS, HEAD_DIM + ROPE_DIM, **options)
        self.latents = torch.randn(INPUTS, s, LATENT + ROPE_DIM, **options)
        self.cache = torch.zeros(s, CONTEXT, LATENT + ROPE_DIM, **options)
        self.q_parts = torch.empty(s, HEADS, HEAD_DIM + ROPE_DIM, **options)
        self.q = torch.empty(s, HEADS, LATENT + ROPE_DIM, **options)
        self.o_latent = torch.empty(s, HEADS, LATENT, **options)
        self.v_val = torch.empty(s, HEADS * HEAD_DIM, device="cuda", dtype=helpers.E4M3)
        self.v_scale = torch.empty(s, HEADS, device="cuda")

    @property
    def results(self):
        return {name: getattr(self, name) for name in ("cache", "q", "o_latent", "v_val", "v_scale")}

    def __call__(self):
        which = self.step % INPUTS
        self.q_parts.copy_(self.queries.index_select(0, which)[0])
        self.cache.index_copy_(1, self.step % CONTEXT, self.latents.index_select(0, which)[0].unsqueeze(1))
        self.absorb(self.q)
        o_latent = attend_latents(self.q.unsqueeze(1), *self.cache.split([LATENT, ROPE_DIM], dim=-1), scale=SCALE)
        self.o_latent.copy_(o_latent[:, 0])
        self.up(self.v_val, self.v_scale)
        self.step.add_(1)

    def absorb(self, q):
        q_nope, q_pe = self.q_parts.split([HEAD_DIM, ROPE_DIM], dim=-1)
        OPS.absorb_q.out(q_nope, *self.weights[0], q_pe, q_out=q)

    def up(self, v_val, v_scale):
        OPS.v_up_quantized.out(self.o_latent, *self.weights[1], val_out=v_val, scale_out=v_scale)

    def assert_right(self):
        """Each result is what its op makes, outside a graph, of the buffers that it read."""
        q, v_val, v_scale = (torch.empty_like(x) for x in (self.q, self.v_val, self.v_scale))
        self.absorb(q)
        helpers.assert_same_bits(self.q, q, "q")
        want = exact(self.q.unsqueeze(1), *self.cache.split([LATENT, ROPE_DIM], dim=-1))
        helpers.assert_frobenius(self.o_latent, want[:, 0], BOUND[torch.bfloat16], "o_latent")
        self.up(v_val, v_scale)
        helpers.assert_same_bits(self.v_val, v_val, "v_val")
        helpers.assert_same_bits(self.v_scale, v_scale, "v_scale")


def replay(graph, count):
    for _ in range(count):
        graph.replay()
    torch.cuda.synchronize()


def memory_bytes():
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@pytest.mark.parametrize("s", [1, 64])
def test_decode_step_replayed_often_keeps_its_bits_and_its_memory(rng, s):
    step = DecodeStep(make_absorb_weight(rng), make_v_weight(rng), s)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # cuBLAS makes its handle and workspace in a first call
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    step.step.zero_()

    def check(number):
        for name, got in step.results.items():
            helpers.assert_same_bits(got, want[name], f"{name} after {number} replays")

    replay(graph, CHECK_EVERY)
    step.assert_right()
    want = {name: result.clone() for name, result in step.results.items()}
    check(0)
    before = memory_bytes()
    for number in range(CHECK_EVERY, REPLAYS + 1, CHECK_EVERY):
        replay(graph, CHECK_EVERY)
        check(number)
        assert memory_bytes() == before, f"after {number} replays"
    replay(graph, 1)
    assert not torch.equal(step.q, want["q"]), "other inputs give other results"
    step.assert_right()
