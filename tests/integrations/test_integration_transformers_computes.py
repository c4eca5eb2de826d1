"""enable() takes what kv_b_proj computes, not what its `.weight` says: packed numbers, hooks, values not there."""

import copy
import re

import mla_models as models
import pytest
import torch
from checkpoints import config, write_checkpoint
from test_integration_transformers import ALL_ABSORBED, BF16_LOGITS, FP8_LOGITS, relative_error
from torch import nn

from mla_fp8.integrations.transformers import disable, enable

WAYS = {"fp8": FP8_LOGITS, "unquantized": BF16_LOGITS}  # quantizing a weight makes the noise of quantizing activations
each_way = pytest.mark.parametrize("weights", WAYS)


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


def test_a_checkpoint_of_16_bits_is_quantized(tmp_path):
    """As Kimi-K2.5's kv_b_proj is, and MTP layers of checkpoints otherwise in FP8."""
    model = models.build(**models.DENSE).bfloat16()
    weights = {name: w for name, w in model.state_dict().items() if "kv_b_proj" in name}
    write_checkpoint(tmp_path, weights, config(heads=models.HEADS))
    enable(model)
    want = [layer.mla_fp8.dequantize() for layer in models.attentions(model)]
    disable(model)
    for layer in models.attentions(model):
        layer.kv_b_proj = meta(layer.kv_b_proj)
    enable(model, checkpoint=tmp_path)
    for layer, (w_uk, w_uv) in zip(models.attentions(model), want, strict=True):
        got_uk, got_uv = layer.mla_fp8.dequantize()
        assert torch.equal(got_uk, w_uk) and torch.equal(got_uv, w_uv)


def test_a_weight_that_cannot_be_quantized_is_named():
    model = models.build(**models.DENSE).bfloat16()
    models.attentions(model)[1].kv_b_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"kv_b_proj of model.layers.1.self_attn must be .*, got from_bf16: .*finite"):
        enable(model)
