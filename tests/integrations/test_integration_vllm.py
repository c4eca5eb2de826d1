"""The vLLM plugin: off unless asked for, both products from FP8, one line a model, and reloads."""

import doctest
import gc
import importlib.metadata
import logging
import sys
import weakref

import fake_vllm as fake
import pytest
import torch
from helpers import EXACT_FROBENIUS, assert_same_bits, randn

from mla_fp8 import absorb_q, v_up
from mla_fp8.integrations import vllm as plugin
from mla_fp8.weights.block_fp8_weight import counts, reset_counts

HEADS, RANK = fake.HEADS, fake.RANK
DONE = "mla_fp8: {} of {} MLA layers run W_UK_T and W_UV from FP8, {:.1f} MB freed"
LAYER_FREED = 2 * HEADS * 128 * RANK * (2 - 1) - 2 * HEADS * 4 * 4  # 16 bits less 8, less the scales


pytestmark = pytest.mark.usefixtures("fresh_vllm")


def relative(got, want) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def test_vllm_entry_point_is_register():
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="mla_fp8")
    assert entry.load() is plugin.register


@pytest.mark.parametrize("switch", [None, "", "0"])
def test_vllm_is_off_unless_asked_for(monkeypatch, log, switch):
    engine = fake.install(monkeypatch)
    before = dict(vars(engine.attention))
    if switch is not None:
        monkeypatch.setenv(plugin.SWITCH, switch)
    plugin.register()
    assert dict(vars(engine.attention)) == before and log.messages == []


def test_vllm_off_imports_nothing_of_vllm(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    plugin.register()
    assert not [name for name in sys.modules if name.split(".")[0] == "vllm"]


def test_vllm_rejects_another_switch(monkeypatch, log):
    engine = fake.install(monkeypatch)
    before = dict(vars(engine.attention))
    monkeypatch.setenv(plugin.SWITCH, "yes")
    plugin.register()
    assert dict(vars(engine.attention)) == before
    want = "register: MLA_FP8_VLLM must be 0, 1 or quantize, got 'yes': vLLM runs its own products"
    assert log.messages == [want]


def test_vllm_register_twice_wraps_once(vllm):
    wrapped = vllm.attention.__init__, vllm.attention.process_weights_after_loading
    plugin.register()
    assert (vllm.attention.__init__, vllm.attention.process_weights_after_loading) == wrapped


def test_vllm_both_weights_are_replaced_and_one_line_says_so(vllm, log, rng):
    layers = [fake.layer(vllm.attention, fake.projection(rng)) for _ in range(3)]
    blocks = [(layer.kv_b_proj.weight.clone(), layer.kv_b_proj.weight_scale_inv.clone()) for layer in layers]
    fake.load(*layers)
    for layer, (weight, scale) in zip(layers, blocks, strict=True):
        assert fake.runs_fp8(layer)
        fake.assert_holds(layer, weight, scale)
    assert log.messages == [DONE.format(3, 3, 3 * LAYER_FREED / 1e6)]
    assert [record.levelno for record in log.records] == [logging.INFO]
    assert plugin.load_seconds > 0


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("pad", [None, 8], ids=["heads", "padded"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_vllm_products_are_the_ops_and_exact(vllm, rng, dtype, name, pad, tokens):
    layer = fake.layer(vllm.attention, fake.projection(rng, name=name), q_pad_num_heads=pad)
    w_uk, w_uv = fake.exact(layer.kv_b_proj.weight, getattr(layer.kv_b_proj, name))
    fake.load(layer, dtype=dtype)
    q_nope = randn(rng, tokens, HEADS, 192, dtype=dtype)[..., :128]
    latent = randn(rng, tokens, HEADS * RANK, dtype=dtype)
    reset_counts()
    got_q, got_v = layer.absorb(q_nope), torch.empty(tokens, HEADS * 128, dtype=dtype)
    layer._v_up_proj(latent, got_v)
    assert counts() == (2, 0)
    for got, x, op, weight, exact in (
        (got_q, q_nope, absorb_q, layer.W_UK_T, w_uk),
        (got_v.view(tokens, HEADS, 128), latent.view(tokens, HEADS, RANK), v_up, layer.W_UV, w_uv),
    ):
        assert_same_bits(got, op(x, weight.weight, weight.scale))
        assert relative(got, torch.einsum("shk,hkn->shn", x.double(), exact)) <= EXACT_FROBENIUS[dtype]


def test_vllm_v32_multiplies_without_out(vllm, rng):
    layer = fake.layer(fake.make_v32(vllm.attention), fake.projection(rng))
    fake.load(layer)
    q_nope = randn(rng, 5, HEADS, 128, dtype=torch.bfloat16)
    reset_counts()
    got = layer.absorb(q_nope)
    assert counts() == (1, 0)
    assert_same_bits(got, absorb_q(q_nope, layer.W_UK_T.weight, layer.W_UK_T.scale))


def test_vllm_takes_blocks_that_vllm_quantizes_again(vllm, log, rng):
    layer = fake.layer(vllm.attention, fake.projection(rng, fake.BlockMethod(to_powers_of_two=True)))
    weight, scale = layer.kv_b_proj.weight.clone(), layer.kv_b_proj.weight_scale_inv.clone()
    fake.load(layer)
    assert not torch.equal(layer.kv_b_proj.weight_scale_inv, scale)
    fake.assert_holds(layer, weight, scale)
    assert log.messages == [DONE.format(1, 1, LAYER_FREED / 1e6)]


def test_vllm_one_quant_method_of_several_layers(vllm, log, rng):
    method = fake.BlockMethod()
    layers = [fake.layer(vllm.attention, fake.projection(rng, method)) for _ in range(3)]
    blocks = [(layer.kv_b_proj.weight.clone(), layer.kv_b_proj.weight_scale_inv.clone()) for layer in layers]
    fake.load(*layers)
    for layer, (weight, scale) in zip(layers, blocks, strict=True):
        fake.assert_holds(layer, weight, scale)


def test_vllm_keeps_no_layer_and_no_projection_alive(vllm, rng):
    method = fake.BlockMethod()
    layer = fake.layer(vllm.attention, fake.projection(rng, method))
    fake.load(layer)
    gone = weakref.ref(layer), weakref.ref(layer.kv_b_proj)
    del layer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_vllm_blocks_are_let_go_after_loading(vllm, rng):
    layer = fake.layer(vllm.attention, fake.projection(rng))
    fake.load(layer)
    assert plugin.layers[layer].blocks is None


def test_vllm_a_draft_model_has_its_own_line(vllm, log, rng):
    vllm.config = object()
    fake.load(*[fake.layer(vllm.attention, fake.projection(rng)) for _ in range(2)])
    fake.load(fake.layer(vllm.attention, fake.projection(rng)))
    assert log.messages == [DONE.format(2, 2, 2 * LAYER_FREED / 1e6), DONE.format(1, 1, LAYER_FREED / 1e6)]


def test_vllm_a_layer_that_is_never_loaded_keeps_no_line_back(vllm, log, rng):
    vllm.config = object()
    never = fake.layer(vllm.attention, fake.projection(rng))  # as of a load that failed, in a traceback that is kept
    vllm.config = object()
    fake.load(fake.layer(vllm.attention, fake.projection(rng)))
    assert log.messages == [DONE.format(1, 1, LAYER_FREED / 1e6)]
    assert never is not None


def test_vllm_a_model_that_was_loaded_in_part_is_told_of_with_the_next(vllm, log, rng):
    done, never = (fake.layer(vllm.attention, fake.projection(rng)) for _ in range(2))
    fake.load(done)
    assert log.messages == []
    fake.load(fake.layer(vllm.attention, fake.projection(rng)))
    assert log.messages == [DONE.format(1, 1, LAYER_FREED / 1e6)] * 2
    assert never is not None


def test_vllm_quantize_takes_16_bits_with_loss(monkeypatch, log, rng):
    engine = fake.install_with_plugin(monkeypatch, "quantize")
    weight = randn(rng, HEADS * 256, RANK, dtype=torch.bfloat16)
    layer = fake.layer(engine.attention, fake.Projection(fake.PlainMethod(), weight=weight))
    fake.load(layer)
    assert fake.runs_fp8(layer)
    w_uk = weight.view(HEADS, 256, RANK)[:, :128].double()
    assert 0 < relative(layer.W_UK_T.dequantize(torch.float64), w_uk) <= 2.9e-2
    kept = 2 * HEADS * (128 * RANK + 4 * 4)  # vLLM's two are views of kv_b_proj, which stays
    assert log.messages == [DONE.format(1, 1, kept / 1e6).replace("freed", "more")]


def test_vllm_quantize_takes_fp8_blocks_without_loss(monkeypatch, rng):
    engine = fake.install_with_plugin(monkeypatch, "quantize")
    layer = fake.layer(engine.attention, fake.projection(rng))
    fake.load(layer)
    fake.assert_holds(layer, layer.kv_b_proj.weight, layer.kv_b_proj.weight_scale_inv)


def test_vllm_register_example_runs():
    (test,) = doctest.DocTestFinder().find(plugin.register, "register", globs={"register": plugin.register})
    assert doctest.DocTestRunner().run(test).failed == 0 and len(test.examples) == 1
