"""absorb_q and v_up among other work on a GPU: graphs, streams, kernels that start before the last one has ended."""

import pytest
import torch
from cases import ACTIVATIONS, OPS, each_activations
from helpers import assert_same_bits
from product_inputs import HEAD_DIM, LATENT, ROPE_DIM, first_heads, make_absorb_weight, make_v_weight, random_q, v_all

from mla_fp8.config import forced_tile

pytestmark = pytest.mark.gpu


@each_activations
@pytest.mark.parametrize("s", [1, 64, 300])
def test_products_cuda_graph_capture(rng, s, activations):
    absorb_weight, v_weight = make_absorb_weight(rng), make_v_weight(rng)
    h = 16
    q, o_latent = random_q(s, h, width=HEAD_DIM + ROPE_DIM), random_q(s, h, width=LATENT)
    out_scale = torch.tensor(0.05, device="cuda")
    weights = first_heads(absorb_weight, h), first_heads(v_weight, h)

    def step():
        q_latent = OPS.absorb_q(q[..., :HEAD_DIM], *weights[0], q[..., HEAD_DIM:], **ACTIVATIONS[activations])
        return q_latent, *v_all(o_latent, weights[1], out_scale, activations)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        q.copy_(random_q(s, h, width=HEAD_DIM + ROPE_DIM))
        o_latent.copy_(random_q(s, h, width=LATENT))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert_same_bits(got, want)


def test_products_cuda_other_stream(rng):
    """On the current stream, after what is there and before what follows."""
    absorb_weight, v_weight = make_absorb_weight(rng), make_v_weight(rng)
    q_source, o_source = random_q(300, 128), random_q(300, 128, width=LATENT)
    want = OPS.absorb_q(q_source, *absorb_weight), OPS.v_up(o_source, *v_weight)
    q, o_latent = torch.full_like(q_source, float("nan")), torch.full_like(o_source, float("nan"))
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            busy = busy @ busy * 1e-4
        q.copy_(q_source), o_latent.copy_(o_source)
        results = OPS.absorb_q(q, *absorb_weight), OPS.v_up(o_latent, *v_weight)
        got = [result.clone() for result in results]
        q.fill_(float("inf")), o_latent.fill_(float("inf"))
    torch.cuda.synchronize()
    for one, expected in zip(got, want, strict=True):
        assert_same_bits(one, expected)


def test_products_cuda_two_streams_at_once(rng):
    absorb_weight = make_absorb_weight(rng)
    sources = [random_q(s, 128) for s in (300, 257)]
    want = [OPS.absorb_q(q, *absorb_weight) for q in sources]
    streams = [torch.cuda.Stream() for _ in sources]
    torch.cuda.synchronize()
    got = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(OPS.absorb_q(sources[i], *absorb_weight))
    torch.cuda.synchronize()
    for results, expected in zip(got, want, strict=True):
        for one in results:
            assert_same_bits(one, expected)


@each_activations
def test_absorb_q_cuda_phases_beside_other_work(rng, activations):
    """CTAs that wait for each other must end, and be right, where others hold SMs, and where two launches meet."""
    absorb_weight = make_absorb_weight(rng)
    q = random_q(3000, 128, width=HEAD_DIM + ROPE_DIM)
    busy = torch.randn(8192, 8192, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(3)]
    call = lambda: OPS.absorb_q(q[..., :HEAD_DIM], *absorb_weight, q[..., HEAD_DIM:], **ACTIVATIONS[activations])  # noqa: E731
    with forced_tile("absorb_q_phased"):
        want = call()
        graphs = []
        for stream in streams[:2]:  # the same counters in every replay
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                result = call()
            graphs.append((graph, result))
        for _ in range(5):
            with torch.cuda.stream(streams[2]):
                busy = busy @ busy * 1e-4
            for stream, (graph, result) in zip(streams, graphs, strict=False):
                with torch.cuda.stream(stream):
                    result.fill_(float("nan"))
                    graph.replay()
            eager = call()
            torch.cuda.synchronize()
            for got in (eager, *(result for _, result in graphs)):
                assert_same_bits(got, want)


@each_activations
@pytest.mark.parametrize("s", [1, 17, 130])
def test_products_cuda_dependent_launch_keeps_order(rng, s, activations):
    """A kernel may start early; it must see its predecessors' writes, and not write before they have read."""
    absorb_weight, v_weight = make_absorb_weight(rng), make_v_weight(rng)
    h, rounds, options = 128, 24, ACTIVATIONS[activations]
    qs = [random_q(s, h) for _ in range(3)]
    rolled = absorb_weight[0].view(torch.uint8).roll(1, 0).view(absorb_weight[0].dtype), absorb_weight[1].roll(1, 0)
    weights = [absorb_weight, rolled]
    want = [[OPS.absorb_q(q, *weight, **options) for weight in weights] for q in qs]
    want_v = [[OPS.v_up(o, *v_weight, **options) for o in row] for row in want]
    q, weight = qs[0].clone(), tuple(tensor.clone() for tensor in absorb_weight)
    latent, v = torch.empty_like(want[0][0]), torch.empty_like(want_v[0][0])
    torch.cuda.synchronize()
    got = []
    for i in range(rounds):
        q.copy_(qs[i % 3])
        for tensor, source in zip(weight, weights[i % 2], strict=True):
            tensor.copy_(source)
        OPS.absorb_q.out(q, *weight, **options, q_out=latent)  # latent is read by the v_up of the round before
        OPS.v_up.out(latent, *v_weight, **options, v_out=v)
        got.append((latent.clone(), v.clone()))
    torch.cuda.synchronize()
    for i, (one, one_v) in enumerate(got):
        assert_same_bits(one, want[i % 3][i % 2], f"round {i}, q_latent")
        assert_same_bits(one_v, want_v[i % 3][i % 2], f"round {i}, v")


@each_activations
@pytest.mark.parametrize("s", [1, 64, 300])
def test_products_cuda_dependent_chain_of_own_kernels(rng, s, activations):
    """Nothing but these kernels: each reads what the one before wrote, and writes what it has read."""
    absorb_weight, v_weight = make_absorb_weight(rng), make_v_weight(rng)
    q, rounds, options = random_q(s, 128), 16, ACTIVATIONS[activations]
    latent = torch.empty(s, 128, LATENT, dtype=q.dtype, device="cuda")
    v = q.clone()
    for _ in range(rounds):
        v = OPS.v_up(OPS.absorb_q(v, *absorb_weight, **options), *v_weight, **options)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            OPS.absorb_q.out(q, *absorb_weight, **options, q_out=latent)
            OPS.v_up.out(latent, *v_weight, **options, v_out=q)
    start = q.clone()
    for _ in range(5):
        q.copy_(start)
        graph.replay()
        assert_same_bits(q, v)


@each_activations
def test_products_cuda_deterministic(rng, activations):
    absorb_weight, v_weight = make_absorb_weight(rng), make_v_weight(rng)
    q, o_latent = random_q(1000, 128), random_q(1000, 128, width=LATENT)
    options = ACTIVATIONS[activations]
    first = OPS.absorb_q(q, *absorb_weight, **options), OPS.v_up(o_latent, *v_weight, **options)
    for _ in range(10):
        assert_same_bits(OPS.absorb_q(q, *absorb_weight, **options), first[0])
        assert_same_bits(OPS.v_up(o_latent, *v_weight, **options), first[1])


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
@pytest.mark.parametrize("s", [1, 64, 2000])
def test_products_cuda_runs_on_its_inputs_devices(rng, s):
    """In one process, in turn and at once, whatever the current device."""
    absorb_weight, v_weight = make_absorb_weight(rng), make_v_weight(rng)
    q, o_latent = random_q(s, 128), random_q(s, 128, width=LATENT)
    want = OPS.absorb_q(q, *absorb_weight), *v_all(o_latent, v_weight, torch.tensor(0.05, device="cuda:0"))

    def on(device):
        there = [tensor.to(device) for tensor in (q, o_latent, *absorb_weight, *v_weight)]
        weights = tuple(there[2:4]), tuple(there[4:6])
        return lambda: (
            OPS.absorb_q(there[0], *weights[0]),
            *v_all(there[1], weights[1], torch.tensor(0.05, device=device)),
        )

    calls = [on("cuda:0"), on("cuda:1")]
    for _ in range(3):
        for results in [call() for call in calls]:
            for got, one in zip(results, want, strict=True):
                assert_same_bits(got.to("cuda:0"), one)
        assert torch.cuda.current_device() == 0
