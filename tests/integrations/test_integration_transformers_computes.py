"""enable() takes what kv_b_proj computes, not what its `.weight` says: adapters, packed and offloaded weights."""

import copy
import re

import mla_models as models
import pytest
import torch
from test_integration_transformers import ALL_ABSORBED, BF16_LOGITS, FP8_LOGITS, relative_error
from torch import nn

from mla_fp8.integrations import absorbed_layer
from mla_fp8.integrations.transformers import disable, enable

WAYS = {"fp8": FP8_LOGITS, "unquantized": BF16_LOGITS}  # quantizing a weight makes the noise of quantizing activations
each_way = pytest.mark.parametrize("weights", WAYS)


@pytest.fixture(autouse=True)
def fresh_warnings():
    absorbed_layer.warn_once.cache_clear()


@pytest.fixture
def inputs():
    return models.prompt()


def with_adapters(**options):
    """A PEFT model in fp32, adapters "default" and "other" on kv_b_proj, and its copy in bf16."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=8, lora_alpha=64, target_modules=["kv_b_proj"], init_lora_weights=False, **options)
    torch.manual_seed(3)
    model = peft.get_peft_model(models.build(**models.DENSE).bfloat16(), config)
    model.add_adapter("other", config)
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
    config = peft.LoraConfig(r=8, lora_alpha=64, target_modules=["kv_b_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    exact = copy.deepcopy(model)
    disable(exact)
    assert relative_error(models.logits(model, inputs), models.logits(exact.float(), inputs)) < WAYS[weights]


class Packed(nn.Module):
    """What an AWQ or GPTQ linear holds: packed integers and scales, but no weight. It computes all the same."""

    def __init__(self, linear):
        super().__init__()
        self.bias, self.linear = None, [linear]
        self.register_buffer("qweight", torch.zeros(linear.in_features, linear.out_features // 8, dtype=torch.int32))

    def forward(self, x):
        return self.linear[0](x)


class Adapted(nn.Linear):
    """An adapter of no library's: inside the forward."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True) / 16


def hooked(linear):
    linear.register_forward_hook(lambda module, args, result: 2 * result)
    return linear


def adapted(linear):
    linear.__class__ = Adapted
    return linear


def meta(linear):
    return copy.deepcopy(linear).to("meta")


COMPUTES = {
    Packed: r"kv_b_proj \(Packed\) has no .weight, but packed numbers",
    hooked: r"kv_b_proj \(Linear\) computes something else than its weight",
    adapted: r"kv_b_proj \(Adapted\) computes something else than its weight",
    meta: "kv_b_proj.weight is on meta, without values",
}


@each_way
@pytest.mark.parametrize("change", COMPUTES, ids=lambda change: change.__name__)
def test_a_layer_that_computes_something_else_is_skipped(inputs, weights, change):
    model = models.build(**models.DENSE).bfloat16()
    layer = models.attentions(model)[1]
    layer.kv_b_proj = change(layer.kv_b_proj)
    before = None if change is meta else models.logits(model, inputs)
    summary = enable(model, weights=weights, prefill_threshold=ALL_ABSORBED)
    assert summary.enabled == ("model.layers.0.self_attn",)
    assert re.fullmatch(COMPUTES[change], summary.skipped["model.layers.1.self_attn"])
    if before is not None:
        with pytest.warns(UserWarning, match="skipped DeepseekV3Attention"):
            assert relative_error(models.logits(model, inputs), before) < WAYS[weights]
    disable(model)
    layer = models.attentions(model)[0]
    layer.kv_b_proj = change(layer.kv_b_proj)
    with pytest.raises(ValueError, match=rf"can be enabled, got .*layers.\{{0-1\}}.self_attn: {COMPUTES[change]}"):
        enable(model, weights=weights)


@pytest.mark.parametrize("change", [Packed, meta], ids=lambda change: change.__name__)
def test_a_checkpoint_needs_no_values(tmp_path, inputs, change):
    exact = models.build(**models.DENSE)
    blocks = models.quantize_kv_b_proj(exact, tmp_path)
    model = copy.deepcopy(exact).bfloat16()
    for layer in models.attentions(model):
        layer.kv_b_proj = change(layer.kv_b_proj)
    enable(model, checkpoint=tmp_path, prefill_threshold=ALL_ABSORBED)
    assert relative_error(models.logits(model, inputs), models.logits(exact, inputs)) < BF16_LOGITS
    if change is meta:  # and are loaded later: the same numbers, so the blocks stay as they are
        for layer in models.attentions(model):
            layer.kv_b_proj.to_empty(device="cpu")
        model.load_state_dict(copy.deepcopy(exact).bfloat16().state_dict())
    models.logits(model, inputs)
    for layer, (value, _) in zip(models.attentions(model), blocks, strict=True):
        assert torch.equal(layer.mla_fp8.w_uk.float(), value.unflatten(0, (models.HEADS, 256))[:, :128].mT.float())
        assert layer.mla_fp8.from_checkpoint


def test_a_weight_that_cannot_be_quantized_is_named():
    model = models.build(**models.DENSE).bfloat16()
    models.attentions(model)[1].kv_b_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"kv_b_proj of model.layers.1.self_attn must be .*, got from_bf16: .*finite"):
        enable(model)


@each_way
def test_an_adapter_on_an_offloaded_model_is_merged(inputs, weights):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    exact, model = with_adapters()
    accelerate.cpu_offload(model, execution_device="cpu")
    enable(model, weights=weights, prefill_threshold=ALL_ABSORBED)
    assert relative_error(models.logits(model, inputs), models.logits(exact, inputs)) < WAYS[weights]
