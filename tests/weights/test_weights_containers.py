"""AbsorbedWeights where other machinery walks over tensors: safetensors, DDP, FSDP, DCP, gloo."""

import copy

import containers
import pytest
import torch
from checkpoints import kv_b_proj
from helpers import bits
from ranks import Ranks
from safetensors.torch import load_file, load_model, save_file, save_model

from mla_fp8 import AbsorbedWeights

RANKS = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    group = Ranks("cpu", RANKS, tmp_path_factory.mktemp("ranks"))
    yield group
    group.stop()


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize(
    "function",
    [
        containers.ddp_without_buffers,
        containers.ddp_that_ignores_them,
        containers.fsdp1,
        containers.fsdp2,
        containers.broadcast_of_bytes,
    ],
    ids=lambda function: function.__name__,
)
def test_buffers_live_in(ranks, function):
    ranks.run(function)


@pytest.mark.xdist_group("distributed")
def test_distributed_checkpoint_keeps_a_view(ranks, tmp_path):
    ranks.run(containers.checkpoint_of_a_view, str(tmp_path / "dcp"))


@pytest.mark.xdist_group("distributed")
def test_gloo_refuses_what_the_docs_say(ranks):
    assert all(ranks.run(containers.refused_by_gloo))


@pytest.fixture
def view(rng):
    weight, scale = kv_b_proj(rng)
    return AbsorbedWeights.from_kv_b_proj(weight, scale, 2)


@pytest.mark.parametrize("remedy", ["copy_w_uv", "deepcopy"])
def test_safetensors_saves_weights_that_own_their_memory(rng, tmp_path, remedy):
    weight, scale = kv_b_proj(rng)
    owned = AbsorbedWeights.from_kv_b_proj(weight, scale, 2, copy_w_uv=remedy == "copy_w_uv")
    if remedy == "deepcopy":
        owned = copy.deepcopy(owned)
    model = torch.nn.ModuleDict({"absorbed": owned, "kv_b_proj": torch.nn.Linear(4, 4)})
    save_file(owned.state_dict(), tmp_path / "a.safetensors")
    save_model(model, str(tmp_path / "b.safetensors"))
    read = load_file(tmp_path / "a.safetensors")
    for name, buffer in owned.named_buffers():
        assert torch.equal(bits(read[name]), bits(buffer)), name
        buffer.view(torch.uint8).zero_()
    load_model(model, str(tmp_path / "b.safetensors"))
    for name, buffer in owned.named_buffers():
        assert torch.equal(bits(buffer), bits(read[name])), name


def test_safetensors_refuses_a_view_and_the_notes_say_so(view, tmp_path):
    with pytest.raises(ValueError, match="non contiguous tensor: `w_uv`"):
        save_file(view.state_dict(), tmp_path / "a.safetensors")
    notes = " ".join(AbsorbedWeights.__doc__.split())
    assert "safetensors refuses it: use copy.deepcopy(weights)" in notes and "copy_w_uv=True" in notes
