"""kv_b_proj in 8 or 4 bits in memory, as FP8Linear, ModelOpt and compressed-tensors hold it."""

import copy

import mla_models as models
import pytest
import torch
from test_integration_transformers import ALL_ABSORBED, FP8_LOGITS, relative_error
from torch import nn

from mla_fp8.integrations.transformers import disable, enable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("one", [False, True], ids=["blocks", "per_tensor"])
def test_a_module_in_fp8_keeps_its_numbers(name, dtype, one):
    """As FP8Linear, compressed-tensors and ModelOpt hold them in memory."""
    model = models.build(**models.DENSE).bfloat16()
    for layer in models.attentions(model):
        linear = nn.Linear(512, models.HEADS * 256, bias=False)
        linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        scale = torch.rand(1 if one else (models.HEADS * 2, 4)).add(0.5).to(dtype)
        setattr(linear, name, nn.Parameter(scale, requires_grad=False))
        layer.kv_b_proj = linear
    enable(model)
    for layer in models.attentions(model):
        w_uk, w_uv = layer.mla_fp8.dequantize()
        scale = getattr(layer.kv_b_proj, name).float()
        whole = scale if one else scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        want = layer.kv_b_proj.weight.float() * whole
        assert torch.equal(torch.cat([w_uk, w_uv], 1).flatten(0, 1), want)


def test_a_module_in_fp8_with_other_scales_is_refused_by_their_shape():
    model = models.build(**models.DENSE).bfloat16()
    for layer in models.attentions(model):
        layer.kv_b_proj.weight.data = layer.kv_b_proj.weight.data.to(torch.float8_e4m3fn)
        layer.kv_b_proj.weight_scale = torch.ones(models.HEADS * 256, 1)
    with pytest.raises(ValueError, match=r"without one scale a 128x128 block, but \{'weight_scale': \[1024, 1\]\}"):
        enable(model)


# compressed-tensors' words for weights.
FORMATS = {
    "block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    "tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
}
REFUSED = {
    "channel": r"without one scale a 128x128 block, but {'weight_scale': \[1024, 1\]}",
    "int4": r"kv_b_proj \(Linear\) has no .weight, but packed numbers",
}


@pytest.mark.parametrize("form", FORMATS)
def test_compressed_tensors_before_and_after_they_are_decompressed(inputs, monkeypatch, form):
    """The library puts 16-bit weights in the packed ones' place when the model first runs."""
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import ModelCompressor

    model = models.build(**models.DENSE).bfloat16()
    scheme = quantization.QuantizationScheme(
        targets=["re:.*kv_b_proj"], weights=quantization.QuantizationArgs(**FORMATS[form])
    )
    quantization.apply_quantization_config(model, quantization.QuantizationConfig(config_groups={"all": scheme}))
    for layer in models.attentions(model):
        scale = layer.kv_b_proj.weight_scale
        scale.data.fill_(layer.kv_b_proj.weight.abs().max().item() / (7 if form == "int4" else 448))
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    if form in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[form]):
            enable(model)
    else:
        enable(model, prefill_threshold=ALL_ABSORBED)
    models.logits(model, inputs)
    if form in REFUSED:
        enable(model, prefill_threshold=ALL_ABSORBED)
    exact = copy.deepcopy(model)
    disable(exact)
    want = models.logits(exact.float(), inputs)
    with models.absorbed_calls(monkeypatch) as calls:
        assert relative_error(models.logits(model, inputs), want) < FP8_LOGITS
    assert len(calls) == models.LAYERS
