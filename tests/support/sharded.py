"""What every rank of test_distributed.py does: its part of each op, beside the whole op."""

import copy
import doctest
import os
import sys
from pathlib import Path

import helpers
import torch
from cases import CASE
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import mla_fp8
from mla_fp8 import distributed

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from compile_layer import BF16_NOISE, DecodeLayer, inputs  # noqa: E402

S = 7
HEAD_DIM = {"q_nope": 1, "q_pe": 1, "o_latent": 1}  # of a tensor that has heads elsewhere than in dim 0
HEAD_DIM_OF_OUTPUT = {"quantize_q_nope": 0, "bmm": 0}  # and 1 for the others


def make_arguments(mesh, name, seed, heads):
    """The same whole arguments on every rank."""
    return CASE[name].arguments(torch.Generator().manual_seed(seed), S, heads, device=mesh.device_type)


def shard(mesh, tensor, dim):
    """This rank's part of a whole tensor, as torch.chunk cuts it; no communication, which float8 has not over gloo."""
    if dim is None:
        return DTensor.from_local(tensor, mesh, [Replicate()])
    part = tensor.chunk(mesh.size(), dim)[mesh.get_rank()]
    return DTensor.from_local(part, mesh, [Shard(dim)], shape=tensor.shape, stride=tensor.stride())


def shard_by_head(mesh, arguments):
    return {
        name: shard(mesh, value, None if name == "out_scale" else HEAD_DIM.get(name, 0))
        if torch.is_tensor(value) else value for name, value in arguments.items()
    }  # fmt: skip


def assert_is_part(mesh, got, want, dim):
    assert got.placements == (Shard(dim),)
    assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
    helpers.assert_same_bits(got.to_local(), want.chunk(mesh.size(), dim)[mesh.get_rank()])


def check_by_head(mesh, name, seed, heads):
    distributed.register_shardings()
    case, arguments = CASE[name], make_arguments(mesh, name, seed, heads)
    sharded = shard_by_head(mesh, arguments)
    with CommDebugMode() as sent:
        results = case.call(sharded)
    assert sent.get_total_counts() == 0
    for got, want in zip(results, case.call(arguments), strict=True):
        assert_is_part(mesh, got, want, HEAD_DIM_OF_OUTPUT.get(case.op, 1))


def check_by_token(mesh, name, seed):
    distributed.register_shardings()
    case, arguments = CASE[name], make_arguments(mesh, name, seed, 3)
    sharded = {
        key: shard(mesh, value, 0 if key in HEAD_DIM else None) if torch.is_tensor(value) else value
        for key, value in arguments.items()
    }
    with CommDebugMode() as sent:
        results = case.call(sharded)
    assert sent.get_total_counts() == 0
    for got, want in zip(results, case.call(arguments), strict=True):
        assert_is_part(mesh, got, want, 0)


def check_replicated(mesh, name, seed):
    distributed.register_shardings()
    case, arguments = CASE[name], make_arguments(mesh, name, seed, 3)
    whole = {key: shard(mesh, v, None) if torch.is_tensor(v) else v for key, v in arguments.items()}
    for got, want in zip(case.call(whole), case.call(arguments), strict=True):
        assert got.placements == (Replicate(),)
        helpers.assert_same_bits(got.to_local(), want)


def check_by_head_and_token(mesh, name, seed):
    """Four ranks in a square: tokens split over one side, heads over the other."""
    square = init_device_mesh(mesh.device_type, (2, 2))
    distributed.register_shardings()
    case, arguments = CASE[name], make_arguments(mesh, name, seed, 4)
    row, column = square.get_coordinate()

    def part(whole, token_dim, head_dim):
        whole = whole if token_dim is None else whole.chunk(2, token_dim)[row]
        return whole if head_dim is None else whole.chunk(2, head_dim)[column]

    def shard_both(name, whole):
        if not torch.is_tensor(whole):
            return whole
        dims = (0, 1) if name in HEAD_DIM else (None, None if name == "out_scale" else 0)
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        return DTensor.from_local(part(whole, *dims), square, placements, shape=whole.shape, stride=whole.stride())

    with CommDebugMode() as sent:
        results = case.call({key: shard_both(key, value) for key, value in arguments.items()})
    assert sent.get_total_counts() == 0
    for got, want in zip(results, case.call(arguments), strict=True):
        assert got.placements == (Shard(0), Shard(1))
        helpers.assert_same_bits(got.to_local(), part(want, 0, 1))


def check_compiled(mesh, name, seed, heads):
    distributed.register_shardings()
    case, arguments = CASE[name], make_arguments(mesh, name, seed, heads)
    from torch._dynamo.backends.common import aot_autograd  # here, for seconds that other ranks need not spend
    from torch._inductor.compile_fx import compile_fx_inner

    targets = []

    def compiler(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return compile_fx_inner(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    for got, want in zip(compiled(shard_by_head(mesh, arguments)), case.call(arguments), strict=True):
        assert_is_part(mesh, got, want, HEAD_DIM_OF_OUTPUT.get(case.op, 1))
    assert f"mla_fp8.{case.op}.default" in targets
    assert not [target for target in targets if "c10d" in target]


def check_rejects(mesh, name, heads, overload):
    """The error's type and text."""
    distributed.register_shardings()
    case, arguments = CASE[name], make_arguments(mesh, name, 0, heads)
    sharded = shard_by_head(mesh, arguments)
    try:
        if overload == "out":
            dim = HEAD_DIM_OF_OUTPUT.get(case.op, 1)
            views = [shard(mesh, torch.empty_like(result), dim) for result in case.call(arguments)]
            case.out(**sharded, **dict(zip(case.outs, views, strict=True)))
        else:
            case.call(sharded)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def check_example_of_docstring(mesh, name):
    weights = mla_fp8.AbsorbedWeights.from_bf16(torch.randn(2 * 256, 512, dtype=torch.bfloat16), num_heads=2)
    names = {"mesh": mesh, "weights": weights.to(mesh.device_type), "torch": torch, "DTensor": DTensor, "Shard": Shard}
    names |= {"absorb_q": mla_fp8.absorb_q, "register_shardings": distributed.register_shardings}
    (example,) = doctest.DocTestFinder().find(getattr(distributed, name), name, globs=names)
    with torch.device(mesh.device_type):
        results = doctest.DocTestRunner().run(example)
    assert results.attempted == 4 and results.failed == 0


def end(mesh, rank):
    """As a crash does."""
    if mesh.get_rank() == rank:
        os._exit(3)


def check_layer(mesh, seed):
    """Column-parallel q, our ops, row-parallel o_proj: what a rank sends is one all-reduce."""
    distributed.register_shardings()
    torch.manual_seed(seed)
    whole = DecodeLayer(heads=4, hidden=256).to(mesh.device_type)
    arguments = inputs(S, 256, mesh.device_type)
    layer = copy.deepcopy(whole)
    for linear, dim in ((layer.q_proj, 0), (layer.o_proj, 1)):
        linear.weight = torch.nn.Parameter(shard(mesh, linear.weight.detach(), dim))
    layer.norm.weight = torch.nn.Parameter(shard(mesh, layer.norm.weight.detach(), None))
    for name, buffer in layer.weights.named_buffers():
        layer.weights.register_buffer(name, shard(mesh, buffer, 0))
    x, latents = (shard(mesh, argument, None) for argument in arguments)
    with torch.no_grad(), CommDebugMode() as sent:
        got = layer(x, latents).full_tensor()
    counts = {str(op): count for op, count in sent.get_comm_counts().items()}
    assert list(counts.values()) == [1] and "all_reduce" in next(iter(counts)), counts
    with torch.no_grad():
        helpers.assert_frobenius(got, whole(*arguments), BF16_NOISE)
