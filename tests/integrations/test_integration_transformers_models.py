"""What people load: wrapped models, multimodal ones, tensor parallel ones; and how enable() says what it did."""

import copy
import re

import mla_models as models
import pytest
import torch
import transformers
from test_integration_transformers import ALL_ABSORBED, BF16_LOGITS, FAMILIES, FP8_LOGITS, relative_error
from torch import nn

from mla_fp8.integrations.summary import Summary, ranges
from mla_fp8.integrations.transformers import disable, enable

WAYS = {"fp8": FP8_LOGITS, "unquantized": BF16_LOGITS}


class Ddp(nn.Module):
    """DistributedDataParallel's name for what it wraps."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def peft(model):
    library = pytest.importorskip("peft", reason="peft is not installed")
    return library.get_peft_model(model, library.LoraConfig(target_modules=["q_b_proj"]))


def layer_by_layer(model):
    model.model.layers = nn.ModuleList(torch.compile(layer, backend="eager") for layer in model.model.layers)
    return model


WRAPPERS = {
    "as loaded": lambda model: model,
    "AutoModel": lambda model: model.model,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "torch.compile of layers": layer_by_layer,
    "DDP": Ddp,
    "PEFT": peft,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_finds_its_checkpoint(tmp_path, inputs, monkeypatch, wrap):
    exact = models.build(**models.DENSE)
    blocks = models.quantize_kv_b_proj(exact, tmp_path)
    model = WRAPPERS[wrap](copy.deepcopy(exact).bfloat16()).eval()
    summary = enable(model, checkpoint=tmp_path, prefill_threshold=ALL_ABSORBED)
    assert len(summary.enabled) == models.LAYERS and not summary.skipped
    for name, (value, _) in zip(summary.enabled, blocks, strict=True):
        held = model.get_submodule(name).mla_fp8.w_uk.float()
        assert torch.equal(held, value.unflatten(0, (models.HEADS, 256))[:, :128].mT.float())
    with torch.no_grad(), models.absorbed_calls(monkeypatch) as calls:
        out = model(**inputs)
    if wrap != "AutoModel":
        got = out.logits.float()[inputs["attention_mask"].bool()]
        assert relative_error(got, models.logits(exact, inputs)) < BF16_LOGITS
    assert len(calls) == models.LAYERS
    disable(model)
    assert not any("mla_fp8" in module._modules for module in model.modules())


def test_a_checkpoint_of_other_names_lists_the_nearest(tmp_path):
    models.quantize_kv_b_proj(models.build(), tmp_path)
    model = models.build(num_hidden_layers=3).bfloat16()
    message = r"hold the tensors of model.layers.2.self_attn.kv_b_proj, got no .*; nearest: model.layers.\d.self_attn"
    with pytest.raises(ValueError, match=message):
        enable(model, checkpoint=tmp_path)


def kimi_k25():
    if not hasattr(transformers, "Kimi_K25Config"):
        pytest.skip(f"not yet in transformers {transformers.__version__}")
    torch.manual_seed(0)
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**models.SMALL, **models.REAL_DIMS, **models.DENSE, "model_type": "deepseek_v3"}
    config = transformers.Kimi_K25Config(
        text_config=text, vision_config=vision, projection_hidden_size=64, tie_word_embeddings=False
    )
    return transformers.Kimi_K25ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("weights", WAYS)
def test_a_multimodal_model_decodes_its_text_absorbed(inputs, monkeypatch, weights):
    exact = kimi_k25()
    model, want = copy.deepcopy(exact).bfloat16(), models.logits(exact, inputs)
    summary = enable(model, weights=weights, prefill_threshold=ALL_ABSORBED)
    assert summary.enabled == tuple(f"model.language_model.layers.{i}.self_attn" for i in range(models.LAYERS))
    assert set(summary.skipped.values()) == {"has no latent cache: not MLA"}  # of the vision tower
    with models.absorbed_calls(monkeypatch) as calls:
        assert relative_error(models.logits(model, inputs), want) < WAYS[weights]
    assert len(calls) == models.LAYERS


@pytest.mark.parametrize("family", ["AXK1", "BailingHybrid", "KimiLinear", "LongcatFlash", "Youtu"])
def test_other_models_of_the_same_head_dims_run_in_fp8(family, monkeypatch):
    if not hasattr(transformers, family + "Config"):
        pytest.skip(f"not yet in transformers {transformers.__version__}")
    options = {**FAMILIES[family], "first_k_dense_replace": 4}
    exact, inputs = models.build(family, **options), models.prompt(batch=2, padding=0)
    model, want = copy.deepcopy(exact).bfloat16(), models.logits(exact, inputs)
    own = relative_error(models.logits(model, inputs), want)
    summary = enable(model, prefill_threshold=ALL_ABSORBED)
    with models.absorbed_calls(monkeypatch) as calls:
        error = relative_error(models.logits(model, inputs), want)
    assert error < FP8_LOGITS * (len(summary.enabled) / models.LAYERS) ** 0.5 + own
    assert len(calls) == len(summary.enabled) > 0


# Published dims (head counts apart) that the FP8 ops have no kernels for, and what is said of them.
DIMS = {
    "Glm4MoeLite": ((512, 192, 64, 256), "qk_nope_head_dim = 192"),
    "Mistral4": ((256, 64, 64, 128), "qk_nope_head_dim = 64"),
    "MiniCPM3": ((256, 64, 32, 64), "qk_nope_head_dim = 64, v_head_dim = 64"),
}


@pytest.mark.parametrize("family", DIMS)
def test_a_model_of_other_dims_is_refused_by_name_and_runs_unquantized(family, inputs):
    if not hasattr(transformers, family + "Config"):
        pytest.skip(f"not yet in transformers {transformers.__version__}")
    (lora, nope, rope, v_dim), said = DIMS[family]
    dims = {"kv_lora_rank": lora, "qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": v_dim}
    exact = models.build(family, **dims, head_dim=rope if family != "Mistral4" else nope + rope)
    model = copy.deepcopy(exact).bfloat16()
    with pytest.raises(ValueError) as error:
        enable(model)
    kind = rf"{family}ForCausalLM \({model.config.model_type}\)"
    assert re.search(
        rf"got {kind}: model.layers.{{0-1}}.self_attn: the FP8 ops have no kernels for {said} \(", str(error.value)
    )
    assert len(str(error.value)) < 300
    enable(exact, weights="unquantized", prefill_threshold=ALL_ABSORBED)
    got = models.logits(exact, inputs)
    disable(exact)
    assert relative_error(got, models.logits(exact, inputs)) < 1e-4


@pytest.mark.parametrize("family", ["GlmMoeDsa", "DeepseekV32"])
def test_a_model_with_an_indexer_is_refused_by_name_and_dims(family):
    if not hasattr(transformers, family + "Config"):
        pytest.skip(f"not yet in transformers {transformers.__version__}")
    dims = {"kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "head_dim": 64}
    model = models.build(family, **dims).bfloat16()
    message = (
        rf"\({model.config.model_type}\): model.layers.{{0-1}}.self_attn: an indexer selects tokens \(kv_lora_rank 512"
    )
    with pytest.raises(ValueError, match=message):
        enable(model)


def test_a_summary_of_61_layers_is_a_few_lines():
    names = [f"model.layers.{i}.self_attn" for i in range(61)]
    skipped = dict.fromkeys(names[3:5], "kv_b_proj has a bias") | {names[60]: "kv_b_proj.weight is torch.int8"}
    summary = Summary(tuple(n for n in names if n not in skipped), skipped, 1_023_456_000)
    assert str(summary).split("\n") == [
        "enabled 58 layers: model.layers.{0-2,5-59}.self_attn",
        "skipped 3 layers (torch's SDPA)",
        "  model.layers.{3-4}.self_attn: kv_b_proj has a bias",
        "  model.layers.60.self_attn: kv_b_proj.weight is torch.int8",
        "1,023.5 MB of FP8 weights",
    ]
    many = Summary((), {name: f"reason {i}" for i, name in enumerate(names)}, 0)
    assert len(str(many).split("\n")) < 10 and "and 57 more reasons" in str(many)


def test_ranges_keep_what_differs_elsewhere():
    assert ranges(["a.0.b", "a.1.b", "a.3.b", "a.1.c", "d"]) == "a.{0-1,3}.b, a.1.c, d"
    assert ranges([f"m.0.attn.{i}" for i in range(2)]) == "m.0.attn.0, m.0.attn.1"


def test_the_refusal_of_a_llama_is_a_sentence():
    model = models.build("Llama", num_hidden_layers=32).bfloat16()
    with pytest.raises(ValueError) as error:
        enable(model)
    assert str(error.value) == (
        "enable: model must have an MLA layer that can be enabled, got LlamaForCausalLM (llama): "
        "model.layers.{0-31}.self_attn: has no latent cache: not MLA"
    )


def test_attention_weights_are_refused(inputs):
    model = models.build(**models.DENSE).bfloat16()
    enable(model)
    message = "mla_fp8: output_attentions must be False for an enabled model .*attn_implementation='eager'"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match=message):
        models.generate(model, inputs, output_attentions=True, return_dict_in_generate=True)
    disable(model)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="model must not return attention weights .*, got output_attentions in"):
        enable(model)
    assert models.generate(model, inputs).shape == (3, 23)
