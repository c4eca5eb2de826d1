"""enable, disable and what a model goes through in between: saving, moving, copying; and what enable refuses."""

import copy
import importlib.metadata
import re
import subprocess
import sys
import warnings

import mla_models as models
import pytest
import torch
from packaging.requirements import Requirement

from mla_fp8.integrations import transformers as integration
from mla_fp8.integrations.transformers import disable, enable, enabled

ALL_ABSORBED = 10**6  # prefill_threshold


@pytest.fixture
def model():
    return models.build().bfloat16()


def absorbed_layers(model, inputs, monkeypatch) -> int:
    """How many layers of a forward run absorbed."""
    with models.absorbed_calls(monkeypatch) as calls:
        models.logits(model, inputs)
    return len(calls)


def saved(model, directory) -> dict[str, bytes]:
    model.save_pretrained(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_summary_names_layers_and_counts_bytes(model):
    summary = enable(model)
    assert summary.enabled == ("model.layers.0.self_attn", "model.layers.1.self_attn") and summary.skipped == {}
    assert summary.memory_bytes == models.LAYERS * models.HEADS * (256 * 512 + 2 * 4 * 4)
    disable(model)
    assert enable(model, weights="unquantized").memory_bytes == 0


def test_summary_says_why_a_layer_is_skipped(model, inputs, monkeypatch):
    layer = models.attentions(model)[1]
    layer.kv_b_proj.bias = torch.nn.Parameter(torch.randn(models.HEADS * 256).bfloat16())
    before = models.logits(model, inputs)
    summary = enable(model, prefill_threshold=ALL_ABSORBED)
    assert summary.enabled == ("model.layers.0.self_attn",)
    assert summary.skipped == {"model.layers.1.self_attn": "kv_b_proj has a bias"}
    with pytest.warns(UserWarning, match="skipped DeepseekV3Attention: it runs torch's SDPA"):
        after = models.logits(model, inputs)
    assert absorbed_layers(model, inputs, monkeypatch) == 1
    assert (after - before).norm() / before.norm() < 0.1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_disable_leaves_nothing(model, inputs, implementation):
    model.set_attn_implementation(implementation)
    before, attributes = models.logits(model, inputs), [set(vars(module)) for module in model.modules()]
    enable(model, prefill_threshold=ALL_ABSORBED)
    assert not torch.equal(models.logits(model, inputs), before)
    disable(model)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert model.config._attn_implementation == implementation
    assert torch.equal(models.logits(model, inputs), before)
    disable(model)  # once more: nothing to do


def test_enabled_disables_after_an_error(model, inputs):
    before = models.logits(model, inputs)
    with pytest.raises(KeyError), enabled(model, prefill_threshold=ALL_ABSORBED) as summary:
        assert len(summary.enabled) == models.LAYERS
        raise KeyError
    assert torch.equal(models.logits(model, inputs), before)
    enable(model)


def test_save_pretrained_is_untouched(model, tmp_path):
    want, keys = saved(model, tmp_path / "before"), list(model.state_dict())
    enable(model)
    assert saved(model, tmp_path / "enabled") == want
    assert list(model.state_dict()) == keys
    model.load_state_dict(model.state_dict(), strict=True)


def test_another_attention_implementation_runs_as_before(model, inputs):
    model.set_attn_implementation("eager")
    before = models.logits(model, inputs)
    enable(model, prefill_threshold=ALL_ABSORBED)
    model.set_attn_implementation("eager")
    assert torch.equal(models.logits(model, inputs), before)
    disable(model)
    assert model.config._attn_implementation == "eager"


def test_the_name_without_enable_is_sdpa_with_one_warning(model, inputs):
    before = models.logits(model, inputs)
    with enabled(model):  # registers the name
        pass
    model.set_attn_implementation("mla_fp8")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(models.logits(model, inputs), before)
        models.generate(model, inputs)
    assert [str(w.message) for w in caught if "mla_fp8" in str(w.message)] == [
        "mla_fp8: enable(model) was not called, or skipped DeepseekV3Attention: it runs torch's SDPA"
    ]


@pytest.mark.parametrize("activations", ["exact", "fp8"])
def test_a_copy_is_enabled_on_its_own(model, inputs, monkeypatch, activations):
    before = models.logits(model, inputs)
    enable(model, activations=activations, prefill_threshold=ALL_ABSORBED)
    twin, absorbed = copy.deepcopy(model), models.logits(model, inputs)
    disable(model)
    assert torch.equal(models.logits(model, inputs), before)
    assert torch.equal(models.logits(twin, inputs), absorbed)
    assert absorbed_layers(twin, inputs, monkeypatch) == models.LAYERS
    models.attentions(twin)[0].kv_b_proj.weight.data.zero_()
    disable(twin)
    assert not torch.equal(models.logits(twin, inputs), before)


def test_a_cast_to_fp16_keeps_the_fp8_weights(model, inputs, monkeypatch):
    twin = copy.deepcopy(model).half()
    for m in (model, twin):
        enable(m, prefill_threshold=ALL_ABSORBED)
    assert torch.equal(models.logits(model.half(), inputs), models.logits(twin, inputs))
    assert absorbed_layers(model, inputs, monkeypatch) == models.LAYERS


def test_a_cast_to_fp32_runs_expanded_with_one_warning(model, inputs, monkeypatch):
    enable(model, prefill_threshold=ALL_ABSORBED)
    with pytest.warns(UserWarning, match="the ops take bfloat16 and float16, got torch.float32") as caught:
        after = models.logits(model.float(), inputs)
    assert len(caught) == 1 and absorbed_layers(model, inputs, monkeypatch) == 0
    disable(model)
    assert torch.equal(models.logits(model, inputs), after)


def test_a_move_takes_the_fp8_weights_along(model):
    enable(model)
    layer = models.attentions(model.to("meta"))[0].mla_fp8
    assert layer.w_uk.is_meta and layer.w_uk.dtype == torch.float8_e4m3fn and layer.w_uv_scale.is_meta


def test_mla_fp8_does_not_import_transformers():
    code = "import sys, mla_fp8, mla_fp8.integrations; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_transformers_missing_names_the_extra():
    code = "import sys; sys.modules['transformers'] = None; import mla_fp8.integrations.transformers"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert re.search(r"ImportError: .*install mla_fp8\[transformers\]", result.stderr)


def test_extra_asks_for_the_oldest_version():
    required = [Requirement(line) for line in importlib.metadata.requires("mla_fp8")]
    (extra,) = [r for r in required if r.name == "transformers" and r.marker.evaluate({"extra": "transformers"})]
    assert str(extra.specifier) == f">={integration.OLDEST}"
