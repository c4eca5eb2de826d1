"""What enable() refuses leaves the model as it was, and says why."""

import re

import mla_models as models
import pytest
import torch

from mla_fp8.integrations import supported
from mla_fp8.integrations import transformers as integration
from mla_fp8.integrations.transformers import enable

ALL_ABSORBED = 10**6  # prefill_threshold


@pytest.fixture
def model():
    return models.build().bfloat16()


def bad_head_dim(model, monkeypatch):
    return {}, models.build(v_head_dim=64).bfloat16()


def old_transformers(model, monkeypatch):
    # transformers may replace itself in sys.modules, so not the one that is imported here.
    monkeypatch.setattr(integration.transformers, "__version__", "5.14.1")
    return {}, model


def already(model, monkeypatch):
    enable(model, prefill_threshold=ALL_ABSORBED)
    return {}, model


def indexer(model, monkeypatch):
    models.attentions(model)[1].indexer = None  # a layer that shares another's choice
    return {}, model


UNQUANTIZED = {"weights": "unquantized"}
FAULTS = {
    old_transformers: "enable: transformers must be 5.15 or later, got 5.14.1",
    already: r"enable: model must not be enabled \(disable it first\), got model.layers.0.self_attn, enabled",
    indexer: r"enable: model must attend to all tokens, got .*: model.layers.1.self_attn: an indexer selects",
    bad_head_dim: r"got .*: model.layers.\{0-1\}.self_attn: the FP8 ops have no kernels for v_head_dim = 64 \(",
    lambda model, _: (
        {},
        model.float(),
    ): "enabled, got .*is torch.float32; weights='fp8' takes bfloat16, float16, float8_e4m3fn$",
    lambda *_: (
        {},
        models.build("Llama").bfloat16(),
    ): "that can be enabled, got LlamaForCausalLM .llama.: model.layers.{0-1}.self_attn: has no latent cache: not MLA$",
    lambda *_: (
        {},
        torch.nn.Linear(2, 2),
    ): "enable: model must have an MLA layer that can be enabled, got Linear, without an attention layer",
    lambda m, _: ({"activations": "int4"}, m): "enable: activations must be 'exact' or 'fp8', got 'int4'",
    lambda m, _: ({"weights": "bf16"}, m): "enable: weights must be 'fp8' or 'unquantized', got 'bf16'",
    lambda m, _: ({**UNQUANTIZED, "checkpoint": "x"}, m): "enable: checkpoint must be None with 'unquantized', got 'x'",
    lambda m, _: (
        {**UNQUANTIZED, "activations": "fp8"},
        m,
    ): "activations must be 'exact' with 'unquantized', got 'fp8'",
    lambda m, _: ({"projections": "fp8"}, m): r"left out \(write activations='fp8' for 'fp8' and .*\), got 'fp8'",
    lambda m, _: ({"projections": "exact"}, m): r"and weights='unquantized' for 'exact'\), got 'exact'",
    lambda m, _: ({"prefill_threshold": 0}, m): "enable: prefill_threshold must be an integer >= 1, got 0",
    lambda m, _: ({"checkpoint": "/nowhere"}, m): "directory must be an existing directory, got '/nowhere'",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_enable_rejects_and_leaves_the_model_as_it_was(model, inputs, monkeypatch, fault):
    options, model = fault(model, monkeypatch)
    is_lm = hasattr(model, "config")
    before, implementation = (
        (models.logits(model, inputs), model.config._attn_implementation) if is_lm else (None, None)
    )
    with pytest.raises((ValueError, ImportError), match=FAULTS[fault]):
        enable(model, **options)
    if is_lm:
        assert model.config._attn_implementation == implementation
        assert torch.equal(models.logits(model, inputs), before)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"expand_kv": None}, "has no expand_kv: its cache holds keys and values"),
        (
            {"qk_rope_head_dim": 40},
            r"the FP8 ops have no kernels for qk_rope_head_dim = 40 \(.*qk_rope_head_dim of 16 to 256\)",
        ),
        (
            {"kv_lora_rank": 500},
            r"the FP8 ops have no kernels for kv_lora_rank = 500 \(multiples of 128 to 16384, .*\)",
        ),
    ],
)
def test_a_layer_that_cannot_be_enabled_has_a_reason(model, monkeypatch, change, reason):
    layer = models.attentions(model)[0]
    for name, value in change.items():
        monkeypatch.delattr(type(layer), name) if value is None else setattr(layer, name, value)
    assert re.fullmatch(reason, supported.why_not(layer, "fp8"))


def test_enable_rejects_a_checkpoint_of_other_heads(tmp_path):
    models.quantize_kv_b_proj(models.build(), tmp_path)
    model = models.build(num_attention_heads=2, num_key_value_heads=2).bfloat16()
    with pytest.raises(
        ValueError, match=r"checkpoint must hold model.layers.0.self_attn.kv_b_proj of \[2, 512\] heads and R"
    ):
        enable(model, checkpoint=tmp_path)
