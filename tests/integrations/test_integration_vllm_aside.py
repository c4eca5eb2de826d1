"""The vLLM plugin steps aside: vLLM's own weights stay, and one line says why."""

import logging
import sys
import types

import fake_vllm as fake
import pytest
import torch
from helpers import assert_same_bits, randn
from torch import nn

from mla_fp8.integrations import vllm as plugin
from mla_fp8.integrations import vllm_engine, vllm_weights
from mla_fp8.integrations.engine import MOST_DIFFERENCE

HEADS, RANK = fake.HEADS, fake.RANK
LINE = "mla_fp8: {} of {} MLA layers run W_UK_T and W_UV from FP8, {} MB freed; {} as before: {}"
OURS = "vLLM runs its own products"

OTHER_NUMBERS = f"W_UK_T differs from kv_b_proj's blocks, in a head by more than {MOST_DIFFERENCE}"


pytestmark = pytest.mark.usefixtures("fresh_vllm")


def assert_steps_aside(log, layer, reason):
    """vLLM's own weights are there, every bit, and the line ends with this reason."""
    want = layer.kv_b_proj.quant_method.dequantize(layer.kv_b_proj, torch.bfloat16)
    fake.load(layer)
    assert fake.is_stock(layer)
    cut = want.view(layer.num_heads, -1, RANK)
    assert_same_bits(layer.W_UK_T.data, cut[:, : layer.qk_nope_head_dim])
    assert_same_bits(layer.W_UV.data, cut[:, layer.qk_nope_head_dim :].mT)
    assert log.messages == [LINE.format(0, 1, "0.0", 1, reason)]
    assert log.records[0].levelno == logging.WARNING


def test_vllm_steps_aside_for_other_head_dims(vllm, log, rng):
    layer = fake.layer(vllm.attention, fake.projection(rng, nope=192, v_dim=256), nope=192, v_dim=256)
    reason = "from_kv_b_proj: qk_nope_head_dim must be a multiple of 128, for one scale covers a 128x128 block and no "
    reason += "block may span two heads (supported: 128, 256, 384, ..., 16384), got 192"
    assert_steps_aside(log, layer, reason)


ROWS = HEADS * 256
ONES = torch.ones(ROWS // 128, RANK // 128)
FP8 = (torch.arange(ROWS * RANK).view(ROWS, RANK) % 7).to(torch.float8_e4m3fn)
OTHER_PROJECTIONS = {
    "bf16": ({"weight": FP8.bfloat16()}, "kv_b_proj.weight is torch.bfloat16, not FP8 in 128x128 blocks"),
    "int8": ({"weight": FP8.to(torch.int8)}, "kv_b_proj.weight is torch.int8, not FP8 in 128x128 blocks"),
    "per tensor": (
        {"weight": FP8, "weight_scale": torch.ones(())},
        "kv_b_proj has scales {'weight_scale': 'float32 []'}, not one [4, 4] a 128x128 block",
    ),
    "per channel": (
        {"weight": FP8, "weight_scale": torch.ones(ROWS, 1)},
        "kv_b_proj has scales {'weight_scale': 'float32 [512, 1]'}, not one [4, 4] a 128x128 block",
    ),
    "no scales": ({"weight": FP8}, "kv_b_proj has scales of no known name, not one [4, 4] a 128x128 block"),
    "bias": ({"weight": FP8, "weight_scale_inv": ONES, "bias": torch.ones(ROWS)}, "kv_b_proj has a bias"),
    "packed": ({"weight_packed": FP8}, "kv_b_proj has no weight to read"),
    "scale not finite": (
        {"weight": FP8, "weight_scale_inv": torch.where(torch.arange(4) == 1, torch.nan, ONES)},
        "from_kv_b_proj: weight_scale_inv must be finite, got NaN or Inf in block [[0, 1]]",
    ),
}


@pytest.mark.parametrize("what", OTHER_PROJECTIONS)
def test_vllm_steps_aside_for_another_projection(vllm, log, what):
    parameters, reason = OTHER_PROJECTIONS[what]
    projection = fake.Projection(fake.PlainMethod(), **parameters)
    projection.wide = FP8.bfloat16()
    assert_steps_aside(log, fake.layer(vllm.attention, projection), reason)


def test_vllm_steps_aside_for_another_shape_of_the_projection(vllm, log, rng):
    projection = fake.projection(rng, heads=3)
    projection.quant_method = fake.PlainMethod()
    projection.wide = FP8.bfloat16()
    layer = fake.layer(vllm.attention, projection)
    assert_steps_aside(log, layer, "kv_b_proj.weight is [768, 512], not [512, 512]")


def test_vllm_steps_aside_for_a_meta_weight(vllm, log):
    projection = fake.Projection(fake.PlainMethod(), weight=FP8.to("meta"), weight_scale_inv=ONES.to("meta"))
    projection.wide = FP8.bfloat16()
    assert_steps_aside(log, fake.layer(vllm.attention, projection), "kv_b_proj has no weight to read")


@pytest.mark.parametrize("attribute", vllm_engine.OTHER_WAYS)
def test_vllm_steps_aside_where_vllm_multiplies_in_another_way(vllm, log, rng, attribute):
    layer = fake.layer(vllm.attention, fake.projection(rng), **{attribute: True})
    assert_steps_aside(log, layer, vllm_engine.OTHER_WAYS[attribute])


def configured(**sections):
    return types.SimpleNamespace(**{name: types.SimpleNamespace(**values) for name, values in sections.items()})


ELASTIC = "elastic expert parallelism sends a new rank the parameters that a model has"
IPC = "weights of load format ipc_cache belong to another process"
CONFIGS = {
    "uva offload": (
        configured(offload_config={"uva": types.SimpleNamespace(cpu_offload_gb=2.0)}),
        "weights are offloaded to the CPU",
    ),
    "prefetch offload": (
        configured(offload_config={"prefetch": types.SimpleNamespace(offload_group_size=4)}),
        "weights are offloaded to the CPU",
    ),
    "ipc_cache": (configured(load_config={"load_format": "ipc_cache"}), IPC),
    "elastic EP": (configured(parallel_config={"enable_elastic_ep": True}), ELASTIC),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_vllm_steps_aside_for_a_configuration(vllm, log, rng, what):
    vllm.config, reason = CONFIGS[what]
    assert_steps_aside(log, fake.layer(vllm.attention, fake.projection(rng)), reason)


def test_vllm_takes_a_configuration_without_any_of_these(vllm, log, rng):
    vllm.config = configured(
        offload_config={
            "uva": types.SimpleNamespace(cpu_offload_gb=0),
            "prefetch": types.SimpleNamespace(offload_group_size=0),
        },
        load_config={"load_format": "auto"},
        parallel_config={"enable_elastic_ep": False},
    )
    layer = fake.layer(vllm.attention, fake.projection(rng))
    fake.load(layer)
    assert fake.runs_fp8(layer) and log.records[0].levelno == logging.INFO


def test_vllm_steps_aside_in_the_weight_cache_process(monkeypatch, vllm, log, rng):
    daemon = types.ModuleType(vllm_engine.WEIGHT_SERVER)
    exec("def load(make):\n    return make()", vars(daemon))
    monkeypatch.setitem(sys.modules, vllm_engine.WEIGHT_SERVER, daemon)
    layer = daemon.load(lambda: fake.layer(vllm.attention, fake.projection(rng)))
    assert_steps_aside(log, layer, "other processes take this one's weights, by their names")
    another = fake.layer(vllm.attention, fake.projection(rng))  # the module is there, and another one loads
    fake.load(another)
    assert fake.runs_fp8(another)


def test_vllm_self_test_steps_aside_for_other_numbers(vllm, log, rng):
    projection = fake.projection(rng)
    projection.quant_method = fake.PlainMethod()
    projection.wide = randn(rng, HEADS * 256, RANK)
    layer = fake.layer(vllm.attention, projection)
    fake.load(layer)
    assert fake.is_stock(layer)
    assert log.messages == [LINE.format(0, 1, "0.0", 1, OTHER_NUMBERS)]


def test_vllm_self_test_steps_aside_for_heads_in_another_order(vllm, log, rng):
    projection = fake.projection(rng)
    wide = fake.dequantized(projection.weight, projection.weight_scale_inv, torch.bfloat16)
    projection.quant_method, projection.wide = fake.PlainMethod(), wide.view(HEADS, -1, RANK).flip(0).flatten(0, 1)
    layer = fake.layer(vllm.attention, projection)
    fake.load(layer)
    assert fake.is_stock(layer)
    assert log.messages == [LINE.format(0, 1, "0.0", 1, OTHER_NUMBERS)]


def test_vllm_steps_aside_for_a_quant_method_without_a_step(vllm, log, rng):
    projection = fake.Projection(types.SimpleNamespace(), weight=FP8, weight_scale_inv=ONES)
    layer = fake.layer(vllm.attention, projection)
    projection.quant_method = fake.PlainMethod()  # which vLLM sets later
    projection.wide = FP8.bfloat16()
    assert_steps_aside(log, layer, "kv_b_proj has a quant_method SimpleNamespace")


def test_vllm_steps_aside_where_the_quant_method_is_another_by_now(vllm, log, rng):
    layer = fake.layer(vllm.attention, fake.projection(rng))
    layer.kv_b_proj.quant_method = fake.BlockMethod()
    assert_steps_aside(log, layer, "kv_b_proj was not loaded")


def test_vllm_weightss_of_both_kinds_are_counted(vllm, log, rng):
    ours = fake.layer(vllm.attention, fake.projection(rng))
    bf16 = [fake.Projection(fake.PlainMethod(), weight=FP8.bfloat16()) for _ in range(2)]
    fake.load(ours, *[fake.layer(vllm.attention, projection) for projection in bf16])
    assert fake.runs_fp8(ours)
    reason = OTHER_PROJECTIONS["bf16"][1]
    assert log.messages == [LINE.format(1, 3, "0.3", 2, reason)]


def lacks(name):
    """vLLM's class without something that the plugin uses."""
    attention = fake.make_class()
    if name == "process_weights_after_loading":
        delattr(attention, name)
        return attention

    class MLAAttention(nn.Module):
        def __init__(self, num_heads, qk_nope_head_dim, v_head_dim, kv_lora_rank, kv_b_proj=None):
            super().__init__()

        def process_weights_after_loading(self, act_dtype):
            self.W_UK_T, self.W_UV = None, None
            return "W_UV"  # and never the other one's name

    return MLAAttention


@pytest.mark.parametrize("name", ["process_weights_after_loading", "W_UK_T"])
def test_vllm_steps_aside_for_another_class(monkeypatch, log, name):
    attention = lacks(name)
    before = dict(vars(attention))
    fake.install_with_plugin(monkeypatch, attention=attention)
    assert dict(vars(attention)) == before
    (message,) = log.messages
    assert message.startswith("register: MLAAttention of vllm ") and message.endswith(f"of ['{name}']: {OURS}")


def test_vllm_steps_aside_for_another_constructor(monkeypatch, log):
    class MLAAttention(nn.Module):
        def __init__(self, heads, config):
            super().__init__()

    fake.install_with_plugin(monkeypatch, attention=MLAAttention)
    (message,) = log.messages
    assert "got none of ['num_heads', 'qk_nope_head_dim', " in message


def test_vllm_steps_aside_without_the_class(monkeypatch, log):
    monkeypatch.setenv(plugin.SWITCH, "1")
    fake.install(monkeypatch)
    del sys.modules[vllm_engine.MODULE].MLAAttention
    plugin.register()
    (message,) = log.messages
    assert message.startswith(f"register: vllm of an unknown version must have MLAAttention in {vllm_engine.MODULE}")


def test_vllm_steps_aside_without_vllm(monkeypatch, log):
    monkeypatch.setenv(plugin.SWITCH, "1")
    monkeypatch.setitem(sys.modules, "vllm", None)  # which makes an import fail
    plugin.register()
    (message,) = log.messages
    assert message.startswith("register: vllm ") and message.endswith(OURS)


def test_vllm_steps_aside_without_its_configuration(monkeypatch, log):
    monkeypatch.setenv(plugin.SWITCH, "1")
    engine = fake.install(monkeypatch)
    del sys.modules[vllm_engine.CONFIG].get_current_vllm_config_or_none
    before = dict(vars(engine.attention))
    plugin.register()
    assert dict(vars(engine.attention)) == before
    assert log.messages[0].endswith(f"got none of ['get_current_vllm_config_or_none']: {OURS}")


BROKEN = {"read_blocks": vllm_weights, "as_weights": vllm_weights, "engine_reason": plugin, "listen": plugin}


@pytest.mark.parametrize("function", BROKEN)
def test_vllm_a_failure_of_the_plugin_leaves_vllms_own(monkeypatch, vllm, log, rng, function):
    def broken(*arguments, **options):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(BROKEN[function], function, broken)
    layer = fake.layer(vllm.attention, fake.projection(rng))
    assert_steps_aside(log, layer, "mla_fp8 failed: RuntimeError('no such luck')")


def test_vllm_a_first_load_that_fails_is_vllms_to_tell(monkeypatch, vllm, log, rng):
    layer = fake.layer(vllm.attention, fake.projection(rng))
    layer.__dict__["between"] = lambda: (_ for _ in ()).throw(MemoryError("vLLM's"))
    with pytest.raises(MemoryError, match="vLLM's"):
        fake.load(layer)
    assert plugin.layers[layer].blocks is None and log.messages == []
    del layer.__dict__["between"]
    fake.load(layer)  # whoever tries again
    assert fake.runs_fp8(layer)
