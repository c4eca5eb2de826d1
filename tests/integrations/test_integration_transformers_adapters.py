"""enable() merges PEFT's adapters on kv_b_proj into what is absorbed, and follows them."""

import copy

import mla_models as models
import pytest
import torch
from test_integration_transformers import ALL_ABSORBED, BF16_LOGITS, FP8_LOGITS, relative_error
from transformers import StaticCache

from mla_fp8.integrations.transformers import disable, enable

WAYS = {"fp8": FP8_LOGITS, "unquantized": BF16_LOGITS}  # quantizing a weight makes the noise of quantizing activations
each_way = pytest.mark.parametrize("weights", WAYS)


def with_adapters(**options):
    """A PEFT model in fp32, adapters "default" and "other" on kv_b_proj, and its copy in bf16."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(r=8, lora_alpha=64, target_modules=["kv_b_proj"], init_lora_weights=False, **options)
    torch.manual_seed(3)
    model = peft.get_peft_model(models.build(**models.DENSE).bfloat16(), lora)
    model.add_adapter("other", lora)
    model = model.eval()
    return copy.deepcopy(model).float(), model


def switch_off(model):
    model.base_model.disable_adapter_layers()


def switch_over(model):
    model.set_adapter("other")


def merge(model):
    model.merge_adapter()


def scale(model):
    for module in model.modules():
        if hasattr(module, "merged_adapters"):
            module.scale_layer(0.5)


@each_way
@pytest.mark.parametrize("dora", [False, True])
def test_enable_merges_an_adapter(inputs, monkeypatch, weights, dora):
    exact, model = with_adapters(use_dora=dora)
    want = models.logits(exact, inputs)
    with exact.disable_adapter():
        assert relative_error(models.logits(exact, inputs), want) > 5 * FP8_LOGITS
    summary = enable(model, weights=weights, prefill_threshold=ALL_ABSORBED)
    assert len(summary.enabled) == models.LAYERS and "adapters (default) are merged" in str(summary)
    with models.absorbed_calls(monkeypatch) as calls:
        assert relative_error(models.logits(model, inputs), want) < WAYS[weights]
    assert len(calls) == models.LAYERS


@each_way
@pytest.mark.parametrize("change", [switch_off, switch_over, merge, scale])
def test_enabled_layers_follow_their_adapters(inputs, monkeypatch, weights, change):
    exact, model = with_adapters()
    enable(model, weights=weights, prefill_threshold=ALL_ABSORBED)
    before = models.logits(model, inputs)
    for m in (exact, model):
        change(m)
    want = models.logits(exact, inputs)
    with models.absorbed_calls(monkeypatch) as calls:
        got = models.logits(model, inputs)
    assert relative_error(got, want) < WAYS[weights] and len(calls) == models.LAYERS
    assert (relative_error(before, want) > 5 * FP8_LOGITS) == (change is not merge)


@each_way
def test_modules_to_save_are_followed(inputs, weights):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, lora = models.build(**models.DENSE).bfloat16(), {"r": 8, "target_modules": ["q_b_proj"]}
    model = peft.get_peft_model(model, peft.LoraConfig(**lora, modules_to_save=["kv_b_proj"])).eval()
    with torch.no_grad():
        for layer in models.attentions(model.base_model.model):
            layer.kv_b_proj.modules_to_save["default"].weight.mul_(3)
    exact = copy.deepcopy(model).float()
    enable(model, weights=weights, prefill_threshold=ALL_ABSORBED)
    want = models.logits(exact, inputs)
    assert relative_error(models.logits(model, inputs), want) < WAYS[weights]
    with exact.disable_adapter(), model.disable_adapter():
        without = models.logits(exact, inputs)
        assert relative_error(models.logits(model, inputs), without) < WAYS[weights]
    assert relative_error(want, without) > 5 * FP8_LOGITS


def test_compiled_code_runs_expanded_under_an_adapter():
    exact, model = with_adapters()
    enable(model)
    ids, step = models.prompt(padding=0)["input_ids"], torch.compile(model, backend="eager")
    cache = StaticCache(model.config, max_cache_len=9)
    with torch.no_grad():
        model(input_ids=ids[:, :6], past_key_values=cache)
        switch_over(model)
        switch_over(exact)
        cache = StaticCache(model.config, max_cache_len=9)
        model(input_ids=ids[:, :6], past_key_values=cache)
        got = step(input_ids=ids[:, 6:], past_key_values=cache).logits[:, -1]
        want = exact(input_ids=ids).logits[:, -1]
    assert relative_error(got, want) < FP8_LOGITS


def test_an_adapter_a_sequence_runs_expanded(inputs, monkeypatch):
    _, model = with_adapters()
    names = ["default", "other", "__base__"]
    with torch.no_grad():
        want = model(**inputs, adapter_names=names).logits
        enable(model, prefill_threshold=ALL_ABSORBED)
        with models.absorbed_calls(monkeypatch) as calls:
            assert torch.equal(model(**inputs, adapter_names=names).logits, want)
    assert calls == []


@each_way
def test_an_adapter_after_enable_is_merged(inputs, weights):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = models.build(**models.DENSE).bfloat16()
    enable(model, weights=weights, prefill_threshold=ALL_ABSORBED)
    lora = peft.LoraConfig(r=8, lora_alpha=64, target_modules=["kv_b_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, lora).eval()
    exact = copy.deepcopy(model)
    disable(exact)
    assert relative_error(models.logits(model, inputs), models.logits(exact.float(), inputs)) < WAYS[weights]


@each_way
def test_an_adapter_on_an_offloaded_model_is_merged(inputs, weights):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    exact, model = with_adapters()
    accelerate.cpu_offload(model, execution_device="cpu")
    enable(model, weights=weights, prefill_threshold=ALL_ABSORBED)
    assert relative_error(models.logits(model, inputs), models.logits(exact, inputs)) < WAYS[weights]
