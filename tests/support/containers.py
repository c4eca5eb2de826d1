"""What torch's own machinery does with a model that holds AbsorbedWeights: functions that a rank of gloo runs."""

import copy

import torch
import torch.distributed as dist
from helpers import bits
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mla_fp8 import AbsorbedWeights


class Layer(torch.nn.Module):
    def __init__(self, seed=0, copy_w_uv=True):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.proj = torch.nn.Linear(8, 8)
        weight = torch.randn(512, 512, generator=rng).to(torch.float8_e4m3fn)
        scale = torch.rand(4, 4, generator=rng)
        self.absorbed = AbsorbedWeights.from_kv_b_proj(weight, scale, 2, copy_w_uv=copy_w_uv)

    def forward(self, x):
        return self.proj(x)


def assert_as_made(module, seed=0):
    want = Layer(seed).absorbed
    found = dict(module.named_buffers())
    for name, buffer in want.named_buffers():
        (got,) = (tensor for path, tensor in found.items() if path.endswith(f"absorbed.{name}"))
        assert got.dtype == buffer.dtype and torch.equal(bits(got), bits(buffer)), name


def step(model):
    model(torch.ones(1, 8)).sum().backward()


def ddp_without_buffers(mesh):
    model = DistributedDataParallel(Layer(), broadcast_buffers=False)
    step(model)
    assert_as_made(model)


def ddp_that_ignores_them(mesh):
    model = Layer()
    names = [name for name, _ in model.named_buffers() if ".w_u" in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    model = DistributedDataParallel(model)
    step(model)
    assert_as_made(model)


def fsdp2(mesh):
    model = fully_shard(Layer(), mesh=mesh)
    step(model)
    assert_as_made(model)


def fsdp1(mesh):
    model = FullyShardedDataParallel(Layer(), device_id=torch.device("cpu"))
    step(model)
    assert_as_made(model)


def broadcast_of_bytes(mesh):
    model = Layer(seed=mesh.get_rank())
    for buffer in model.absorbed.buffers():
        dist.broadcast(buffer.view(torch.uint8), 0)
    assert_as_made(model, seed=0)


def checkpoint_of_a_view(mesh, directory):
    checkpoint.save(Layer(copy_w_uv=False).state_dict(), checkpoint_id=directory)
    other = Layer(seed=1, copy_w_uv=False)
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=directory)
    other.load_state_dict(state)
    assert_as_made(other)


def refused_by_gloo(mesh):
    """What integrations.md says does not go over gloo; a torch in which it does should be told there."""
    state = Layer().state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    calls = {
        "broadcast": lambda: dist.broadcast(state["absorbed.w_uk"].clone(), 0),
        "all_reduce": lambda: dist.all_reduce(state["absorbed.w_uk"].clone()),
        "DDP": lambda: step(DistributedDataParallel(Layer())),
        "broadcast_from_rank0": lambda: set_model_state_dict(
            Layer(), copy.copy(state) if mesh.get_rank() == 0 else {}, options=options
        ),
    }
    refused = []
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            if "Invalid scalar type" in str(error):
                refused.append(name)
    return refused == list(calls)
