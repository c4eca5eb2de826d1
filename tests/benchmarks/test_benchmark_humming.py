"""humming as a peer, without it: a stand-in takes what its launcher takes, and multiplies on the CPU."""

import json
import sys
import types

import pytest
import torch

from benchmarks.bench import contenders, humming_calls, measure, sides, triton_calls
from mla_fp8.formats import E4M3, GROUP

SIDES = ["front512", "front576", "back"]
LOCKS_OF_A_GRID = 132 * 2 * 11 // 10  # of 2 CTAs an SM: the least that its launcher asks for
OWN_TILE = {"mma_type": "wgmma", "block_shape": (24, 256, 64), "warp_shape": (24, 64, 64), "use_stream_k": True}


class Layer(types.SimpleNamespace):
    def to_str(self):
        return json.dumps(vars(self))


def prepare(tensors, shape_n, shape_k, weight_schema, num_experts, torch_dtype, device):
    """Scales of any rows -> [H,K/128,...], as its kernels read them; it repacks the weights, here they stay."""
    weight, scale, rows = tensors["weight"], tensors["weight_scale"], weight_schema.weight_scale_group_size_n or 1
    assert weight.shape == (num_experts, shape_n, shape_k // 4) and weight.dtype == torch.int32
    assert scale.shape == (num_experts, shape_n // rows, shape_k // GROUP) and torch_dtype == torch.bfloat16
    assert scale.dtype == (torch.float32 if rows == GROUP else torch.bfloat16)
    layer = Layer(num_experts=num_experts, shape_n=shape_n, shape_k=shape_k, rows=rows)
    return layer, {"weight": weight.clone(), "weight_scale": scale.mT.contiguous()}


def humming_gemm(
    *, layer_config, compute_config, tuning_config, inputs, outputs, weight, weight_scale, expert_layout, locks
):
    layer, tuning = Layer(**json.loads(layer_config)), json.loads(tuning_config)
    h, n, k = layer.num_experts, layer.shape_n, layer.shape_k
    assert json.loads(compute_config) == {"gemm_type": "grouped_masked"}
    assert tuning["block_shape"][0] == tuning["warp_shape"][0] and tuning["block_shape"][0] % 8 == 0
    s = inputs.shape[0] // h
    for tensor, width in ((inputs, k), (outputs, n)):
        assert tensor.is_contiguous() and tensor.shape == (h * s, width) and tensor.dtype == torch.bfloat16
    assert expert_layout.dtype == torch.int32 and expert_layout.tolist() == [s] * h
    assert locks.dtype == torch.int32 and locks.numel() >= LOCKS_OF_A_GRID and not locks.any()
    scale = weight_scale.mT.bfloat16().repeat_interleave(layer.rows, 1).repeat_interleave(GROUP, 2)
    values = weight.view(E4M3).bfloat16() * scale
    outputs.view(h, s, n).copy_(torch.bmm(inputs.view(h, s, k).float(), values.float().mT))


@pytest.fixture
def library(monkeypatch):
    """Put in the places of the modules that are imported; copies are torch's in place of Triton's."""
    for name, parts in {
        "humming": {},
        "humming.schema": {"HummingWeightSchema": types.SimpleNamespace},
        "humming.transform": {"prepare_and_transform_humming_tensors": prepare},
        "humming.tune": {"get_heuristics_config": lambda *_, **__: OWN_TILE},
        "humming.ops": {"humming_gemm": humming_gemm},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)

    def move(a, pe, scale, out):
        out.copy_(a if pe is None else torch.cat([a, pe], dim=-1))

    monkeypatch.setattr(triton_calls, "_move_rows", move)
    return sys.modules["humming"]


@pytest.mark.parametrize("s", [1, 5])
@pytest.mark.parametrize("side", SIDES)
def test_humming_turns_the_others_inputs_into_their_output(library, side, s):
    side = sides.SIDES[side]
    for contender in contenders.humming(library, side):
        buffers = sides.Buffers(side, s, 3, {}, 0, "cpu")
        for config in contender.configs:
            buffers.poison(contender.layout)
            contender.call(buffers, **config)
            error = measure.relative_error(buffers.decode(contender.layout), buffers.exact())
            assert 1e-3 < error < contender.tolerance, (contender.name, config)


def test_humming_prepares_weights_once_a_buffer_set(library, monkeypatch):
    made, scratch = [], {}
    monkeypatch.setattr(
        sys.modules["humming.transform"],
        "prepare_and_transform_humming_tensors",
        lambda *tensors, **options: made.append(options) or prepare(*tensors, **options),
    )
    contender = contenders.humming(library, sides.SIDES["front512"])[0]
    for seed in range(2):
        buffers = sides.Buffers(sides.SIDES["front512"], 2, 3, scratch, seed, "cpu")
        for _ in range(2):
            contender.call(buffers, scales="block", tile="own")
            error = measure.relative_error(buffers.decode("out_hs"), buffers.exact())
            assert error < contender.tolerance
    assert len(made) == 2


@pytest.mark.parametrize(
    ("s", "most", "rows"), [(1, 64, 8), (16, 64, 16), (64, 64, 64), (65, 64, 40), (1024, 176, 176), (1024, 64, 64)]
)
def test_humming_tiles_share_rows_evenly(s, most, rows):
    assert humming_calls.rows_of_tile(s, most) == rows


@pytest.mark.parametrize("side", list(sides.SIDES))
def test_humming_that_is_not_installed_keeps_its_rows(side):
    found = contenders.available("humming", contenders.humming, sides.SIDES[side])
    assert len(found) == {"front512": 2, "front576": 1, "back": 2}.get(side, 0)
    for one in found:
        assert isinstance(one, contenders.Missing) and "humming W8A16" in one.name
        assert (one.status, "humming" in one.reason) == ("not installed", True)
