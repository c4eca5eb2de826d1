"""The SGLang plugin: off unless asked for, what it replaces and frees, and that its products are right."""

import doctest
import importlib.metadata
import logging
import sys

import fake_sglang as fake
import pytest
import torch
from helpers import fail_at_worst, randn

from mla_fp8.formats import dequantize_blocks
from mla_fp8.integrations import sglang as plugin
from mla_fp8.integrations.engine import Summary
from mla_fp8.weights import block_fp8_weight as uses

BF16_STEP = 2.0**-8  # of an exact product, which is rounded once, with room for sums in another order
BYTES_A_LAYER = fake.HEADS * (2 * 2 - 1) * 128 * 512  # two 16-bit weights for one in FP8, without scales


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    monkeypatch.setattr(plugin, "load_seconds", 0.0)


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger=plugin.__name__)
    return caplog


@pytest.fixture
def engine(monkeypatch, log, release):
    monkeypatch.setenv(plugin.SWITCH, "1")
    engine = fake.install(monkeypatch, release)
    log.clear()
    return engine


@pytest.fixture(params=fake.RELEASES)
def release(request):
    return request.param


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


def are_ours(attention):
    return plugin.pair_in(attention) is not None


def test_sglang_entry_point_is_register():
    (entry,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="mla_fp8")
    assert entry.load() is plugin.register


@pytest.mark.parametrize("switch", [None, "", "0"])
def test_sglang_is_off_unless_asked_for(monkeypatch, log, rng, switch):
    if switch is not None:
        monkeypatch.setenv(plugin.SWITCH, switch)
    engine = fake.install(monkeypatch)
    assert engine.registry.hooks == [] and not hasattr(engine.mixin.post_load_weights, "__wrapped__")
    model = engine.model(rng)
    model.post_load_weights()
    assert not any(map(are_ours, attentions(model))) and engine.mixin.calls == [None]
    assert log.messages == []


def test_sglang_off_imports_nothing_of_sglang(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    plugin.register()
    assert not [name for name in sys.modules if name.split(".")[0] == "sglang"]


def test_sglang_rejects_another_switch(monkeypatch, log):
    monkeypatch.setenv(plugin.SWITCH, "yes")
    engine = fake.install(monkeypatch)
    assert engine.registry.hooks == []
    assert log.messages == ["register: MLA_FP8_SGLANG must be 0 or 1, got 'yes': SGLang keeps its own weights"]


def test_sglang_replaces_both_weights_of_every_layer(engine, rng, log):
    model = engine.model(rng, layers=3)
    model.post_load_weights()
    for attention in attentions(model):
        weight, scale = attention.kv_b_proj.weight, attention.kv_b_proj.weight_scale_inv
        want = fake.dequantized(weight, scale).unflatten(0, (fake.HEADS, 256))
        assert torch.equal(attention.w_kc.dequantize(), want[:, :128])
        assert torch.equal(attention.w_vc.dequantize(), want[:, 128:].mT)
    (message,) = log.messages
    assert message == "mla_fp8: 3 of 3 MLA layers run w_kc and w_vc of DeepseekV3ForCausalLM from FP8, 1.8 MB freed"
    assert log.records[0].levelno == logging.INFO


def test_sglang_w_vc_is_a_view_and_w_kc_a_copy(engine, rng):
    model = engine.model(rng, layers=1)
    model.post_load_weights()
    (attention,) = attentions(model)
    pair, weight = plugin.pair_in(attention), attention.kv_b_proj.weight
    shared = [part.weight.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() for part in pair]
    assert shared == [False, True]
    w_kc, _ = pair
    summary = Summary(plugin.logger)
    summary.replaced((w_kc.dequantize(), pair[1].dequantize()), pair, tuple(attention.kv_b_proj.parameters()))
    beside = w_kc.scale.nbytes + pair[1].scale.nbytes  # at most: w_vc's may be a view, too
    assert BYTES_A_LAYER - beside <= summary.freed_bytes <= BYTES_A_LAYER


@pytest.mark.parametrize("s", [0, 1, 7])
def test_sglang_products_match_fp64(engine, rng, s):
    model = engine.model(rng, layers=1)
    model.post_load_weights()
    (attention,) = attentions(model)
    q_nope = randn(rng, s, fake.HEADS, 128 + 64, dtype=torch.bfloat16)[..., :128]
    attended = randn(rng, s, fake.HEADS, 512, dtype=torch.bfloat16)
    uses.reset_counts()
    latent, out = attention(q_nope, attended)
    assert uses.counts() == (2, 0)
    kv_b_proj = dequantize_blocks(attention.kv_b_proj.weight, attention.kv_b_proj.weight_scale_inv)
    w_uk, w_uv = kv_b_proj.unflatten(0, (fake.HEADS, 256)).split(128, 1)
    for name, x, w, got in (
        ("q_latent", q_nope, w_uk, latent),
        ("v", attended, w_uv.mT, out.unflatten(1, (fake.HEADS, 128))),
    ):
        want = torch.einsum("shk,hkn->shn", x.double(), w)
        size = torch.einsum("shk,hkn->shn", x.double().abs(), w.abs())
        fail_at_worst((got - want).abs() > BF16_STEP * want.abs() + 2.0**-16 * size, got, want, name)


def test_sglang_asks_for_one_layer_at_a_time(engine, rng):
    model = engine.model(rng, layers=3)
    model.model.end_layer = 2  # the others are another pipeline rank's
    model.post_load_weights()
    assert engine.mixin.calls == [[f"model.layers.{i}.self_attn.kv_b_proj.weight"] for i in range(2)]
    assert [are_ours(attention) for attention in attentions(model)] == [True, True, False]


def test_sglang_draft_layer(engine, rng):
    model = engine.model(rng, layers=1)
    model.model.decoder = model.model.layers[0]
    model.post_load_weights(is_nextn=True)
    assert are_ours(model.model.decoder.self_attn)


@pytest.mark.parametrize("release", ["0.5.23"], indirect=True)  # 0.5.17 takes no model with such a layer
def test_sglang_layer_without_kv_b_proj_is_left_alone(engine, rng):
    model = engine.model(rng, layers=2)
    del model.model.layers[1].self_attn.kv_b_proj
    model.post_load_weights()
    first, second = attentions(model)
    assert are_ours(first) and second.w_kc is None and second.w_vc is None


def test_sglang_names_of_other_weights_do_nothing(engine, rng, log):
    model = engine.model(rng)
    model.post_load_weights(weight_names=["model.layers.0.mlp.gate.weight"])
    assert [attention.w_kc for attention in attentions(model)] == [None, None] and log.messages == []


def test_sglang_says_how_long_it_took(engine, rng):
    assert plugin.load_seconds == 0
    engine.model(rng).post_load_weights()
    first = plugin.load_seconds
    assert 0 < first < 60
    engine.model(rng).post_load_weights()
    assert plugin.load_seconds > first


def test_sglang_counts_no_self_test_as_a_read(engine, rng):
    uses.reset_counts()
    engine.model(rng).post_load_weights()
    assert uses.counts() == (0, 0)


def test_sglang_heads_of_a_context_parallel_rank_run_from_fp8(engine, rng):
    """SGLang narrows w_kc and w_vc to the heads of a rank, and restores them."""
    model = engine.model(rng, layers=1)
    model.post_load_weights()
    (attention,) = attentions(model)
    q_nope = randn(rng, 2, fake.HEADS, 128, dtype=torch.bfloat16)
    want = attention(q_nope)[0]
    attention.w_kc = attention.w_kc.narrow(0, 1, 2)
    uses.reset_counts()
    got = torch.bmm(q_nope[:, 1:].transpose(0, 1), attention.w_kc).transpose(0, 1)
    assert torch.equal(got, want[:, 1:]) and uses.counts() == (1, 0)


def test_sglang_replicated_q_gets_plain_weights(engine, rng):
    """--dcp-replicate-q-proj gathers w_kc.contiguous() of all ranks."""
    model = engine.model(rng, layers=1)
    model.post_load_weights()
    w_kc = attentions(model)[0].w_kc
    assert w_kc.dtype == torch.bfloat16 and type(w_kc.contiguous()) is torch.Tensor


def test_sglang_register_example_runs():
    (test,) = doctest.DocTestFinder().find(plugin.register, "register", globs={"register": plugin.register})
    assert doctest.DocTestRunner().run(test).failed == 0 and len(test.examples) == 1
