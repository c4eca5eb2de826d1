"""BlockFp8Weight on a GPU: captured in CUDA graphs, without a look at the host, and on several streams."""

import pytest
import torch
from block_weights import HEADS, make, op_result, token_major
from helpers import assert_same_bits

from mla_fp8 import jit
from mla_fp8.weights.block_fp8_weight import counts, reset_counts

pytestmark = pytest.mark.gpu

S = 8


@pytest.fixture(autouse=True)
def ready():
    jit.warm_up()
    reset_counts()


def layer(weight, x, q):
    """The three forms of a product that engines write."""
    torch.bmm(x.transpose(0, 1), weight, out=q[..., :512].transpose(0, 1))
    head_major = torch.empty(HEADS, x.shape[0], 512, dtype=x.dtype, device=x.device)
    torch.bmm(x.transpose(0, 1), weight, out=head_major)
    return head_major, torch.bmm(x.transpose(0, 1), weight)


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
def test_graph_replays_new_inputs_and_updated_weights(rng, inference):
    weight, other = make(rng, device="cuda"), make(rng, device="cuda")
    with torch.inference_mode(inference):
        x, q = token_major(rng, weight, S).contiguous(), torch.zeros(S, HEADS, 576, dtype=torch.bfloat16, device="cuda")
        layer(weight, x, q)
        torch.cuda.synchronize()
        reset_counts()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = layer(weight, x, q)
        assert counts() == (3, 0), "counted when captured"
        for step in range(3):
            x.copy_(token_major(rng, weight, S))
            if step == 2:
                weight.update_(other.weight, other.scale)
            graph.replay()
            want = op_result(x, other if step == 2 else weight)
            for got in (q[..., :512], *(result.transpose(0, 1) for result in results)):
                assert_same_bits(got, want)
            assert not q[..., 512:].any()
        assert counts() == (3, 0), "and not when replayed"


def test_product_does_not_synchronize_and_allocates_its_result_only(rng):
    weight = make(rng, device="cuda")
    x = token_major(rng, weight, S).transpose(0, 1)
    out = torch.bmm(x, weight)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.bmm(x, weight, out=out)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        result = torch.bmm(x, weight)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(result, out)


def test_product_runs_on_the_current_stream(rng):
    weight, stream = make(rng, device="cuda"), torch.cuda.Stream()
    x = token_major(rng, weight, S)
    want = op_result(x, weight)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x + 0
        got = torch.bmm(late.transpose(0, 1), weight)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(got.transpose(0, 1), want)


def test_weight_takes_far_less_memory_than_16_bits(rng):
    """In the place of a bf16 weight it must not keep one alive."""
    host = make(rng, heads=64)
    before = torch.cuda.memory_allocated()
    weight = host.cuda()
    assert torch.cuda.memory_allocated() - before < 0.55 * weight.numel() * 2


def test_factors_on_two_devices_are_an_error(rng):
    weight = make(rng, device="cuda")
    with pytest.raises(RuntimeError, match="must be on the device of"):
        torch.bmm(token_major(rng, weight, S, device="cpu").transpose(0, 1), weight)


def test_record_stream_is_of_the_parts(rng):
    weight = make(rng, device="cuda")
    weight.record_stream(torch.cuda.Stream())
    assert counts() == (0, 0)


def test_address_is_refused_where_there_are_others(rng):
    with pytest.raises(TypeError, match="has no 16-bit storage"):
        make(rng, dtype=torch.float16, device="cuda").__cuda_array_interface__  # noqa: B018
