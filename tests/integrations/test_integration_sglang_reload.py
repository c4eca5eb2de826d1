"""The SGLang plugin over a reload of weights: addresses stay, and a failure half way leaves what can serve."""

import logging

import fake_sglang as fake
import pytest
import torch
from helpers import randn

from mla_fp8.integrations import sglang as plugin


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger=plugin.__name__)
    return caplog


@pytest.fixture(params=fake.RELEASES)
def engine(monkeypatch, request, log):
    monkeypatch.setenv(plugin.SWITCH, "1")
    return fake.install(monkeypatch, request.param)


@pytest.fixture
def model(engine, rng, log):
    model = engine.model(rng, layers=3)
    model.post_load_weights()
    engine.mixin.calls.clear()
    log.clear()
    return model


def weights(model):
    return [getattr(layer.self_attn, name) for layer in model.model.layers for name in ("w_kc", "w_vc")]


def addresses(model):
    return [part.data_ptr() for weight in weights(model) for part in (weight.weight, weight.scale)]


def assert_right(attention):
    """The products are those of SGLang's own weights, made of what kv_b_proj holds now."""
    want = fake.dequantized(attention.kv_b_proj.weight, attention.kv_b_proj.weight_scale_inv)
    w_uk, w_uv = want.unflatten(0, (fake.HEADS, 256)).split(128, 1)
    assert torch.equal(attention.w_kc.dequantize(), w_uk) and torch.equal(attention.w_vc.dequantize(), w_uv.mT)


def test_sglang_reload_keeps_objects_and_addresses(model, rng, log):
    objects, before = weights(model), addresses(model)
    fake.reload(model, rng)
    model.post_load_weights()
    assert all(now is then for now, then in zip(weights(model), objects, strict=True))
    assert addresses(model) == before
    for layer in model.model.layers:
        assert_right(layer.self_attn)
    assert log.messages == []  # a trainer may send weights every minute


def test_sglang_reload_changes_the_products(model, rng):
    attention = model.model.layers[0].self_attn
    q_nope = randn(rng, 2, fake.HEADS, 128, dtype=torch.bfloat16)
    before = attention(q_nope)
    fake.reload(model, rng)
    model.post_load_weights()
    after = attention(q_nope)
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_sglang_reload_of_one_layer(model, rng, engine):
    others = [weight.dequantize() for weight in weights(model)[2:]]
    fake.reload(model, rng, [0])
    names = ["model.layers.0.self_attn.kv_b_proj.weight", "model.layers.0.self_attn.kv_b_proj.weight_scale_inv"]
    model.post_load_weights(weight_names=iter(["lm_head.weight", *names]))
    assert engine.mixin.calls == [names]
    assert_right(model.model.layers[0].self_attn)
    assert all(
        torch.equal(weight.dequantize(), other) for weight, other in zip(weights(model)[2:], others, strict=True)
    )


def test_sglang_reload_in_two_calls(model, rng):
    """Weights that come in buckets: the value of kv_b_proj first, its scale later."""
    projection = model.model.layers[1].self_attn.kv_b_proj
    weight, scale = fake.blocks(rng, *projection.weight.shape)
    for parameter, new, name in (
        (projection.weight, weight, "weight"),
        (projection.weight_scale_inv, scale, "weight_scale_inv"),
    ):
        parameter.data.copy_(new)
        model.post_load_weights(weight_names=[f"model.layers.1.self_attn.kv_b_proj.{name}"])
    assert_right(model.model.layers[1].self_attn)


def test_sglang_reload_into_new_parameters(model, rng):
    """An engine may give kv_b_proj new storage; ours keeps its address all the same."""
    before = addresses(model)
    for layer in model.model.layers:
        for parameter in layer.self_attn.kv_b_proj.parameters():
            parameter.data = parameter.data.clone()
    fake.reload(model, rng)
    model.post_load_weights()
    assert addresses(model) == before
    for layer in model.model.layers:
        assert_right(layer.self_attn)


def test_sglang_reload_under_inference_mode(model, rng):
    with torch.inference_mode():
        fake.reload(model, rng)
        model.post_load_weights()
    assert_right(model.model.layers[2].self_attn)


def test_sglang_load_that_fails_half_way_raises_sglangs_error(engine, rng):
    model = engine.model(rng, layers=3)
    engine.mixin.fails_at = 1
    with pytest.raises(RuntimeError, match="out of memory"):
        model.post_load_weights()
    first, second, third = (layer.self_attn for layer in model.model.layers)
    assert plugin.pair_in(first) and second.w_kc is None and third.w_kc is None
    engine.mixin.fails_at = None
    model.post_load_weights()
    assert all(plugin.pair_in(layer.self_attn) for layer in model.model.layers)


def test_sglang_reload_that_fails_half_way_keeps_weights_that_run(model, engine, rng):
    objects = weights(model)
    fake.reload(model, rng)
    engine.mixin.fails_at = 1
    with pytest.raises(RuntimeError, match="out of memory"):
        model.post_load_weights()
    assert all(now is then for now, then in zip(weights(model), objects, strict=True))
    assert_right(model.model.layers[0].self_attn)
    engine.mixin.fails_at = None
    model.post_load_weights()  # SGLang's roll-back, or the next try
    for layer in model.model.layers:
        assert_right(layer.self_attn)


def test_sglang_reload_that_ours_fails_says_so(model, rng, log, monkeypatch):
    fake.reload(model, rng)

    def fault(*_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(plugin, "pair_of", fault)
    model.post_load_weights()
    attention = model.model.layers[0].self_attn
    assert type(attention.w_kc) is torch.Tensor  # new numbers, for whoever asks the layer
    want = fake.dequantized(attention.kv_b_proj.weight, attention.kv_b_proj.weight_scale_inv)
    assert torch.equal(attention.w_kc, want.unflatten(0, (fake.HEADS, 256))[:, :128])
    errors = [record.getMessage() for record in log.records if record.levelno == logging.ERROR]
    assert len(errors) == 3 and "CUDA graphs that were captured before still read the old weights" in errors[0]


def test_sglang_reload_leaves_sglangs_own_weights_where_they_are(engine, rng, log):
    """A layer that once kept SGLang's weights keeps them, for CUDA graphs have their addresses."""
    engine.context.model.weight_cache_mode = "client"
    model = engine.model(rng)
    model.post_load_weights()
    before = [weight.data_ptr() for weight in weights(model)]
    engine.context.model.weight_cache_mode = "off"
    fake.reload(model, rng)
    model.post_load_weights()
    assert [weight.data_ptr() for weight in weights(model)] == before
    attention = model.model.layers[1].self_attn
    want = fake.dequantized(attention.kv_b_proj.weight, attention.kv_b_proj.weight_scale_inv)
    assert torch.equal(attention.w_kc, want.unflatten(0, (fake.HEADS, 256))[:, :128])


def test_sglang_reload_with_another_engine_option_still_updates(model, engine, rng):
    """Options that would keep the plugin from a new model do not take from a loaded one what its graphs read."""
    before = addresses(model)
    engine.context.model.weight_cache_mode = "client"
    fake.reload(model, rng)
    model.post_load_weights()
    assert addresses(model) == before
    assert_right(model.model.layers[0].self_attn)
