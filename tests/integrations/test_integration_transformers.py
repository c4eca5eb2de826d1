"""transformers' MLA models give the same with absorbed decoding: tokens in fp32, logits within a mode's noise."""

import copy
import math

import mla_models as models
import pytest
import torch
from helpers import FP8_FROBENIUS, ROUNDING_FROBENIUS
from transformers import StaticCache
from transformers.integrations.finegrained_fp8 import FP8Linear

from mla_fp8.integrations import absorbed_layer
from mla_fp8.integrations.transformers import disable, enable, enabled

ALL_ABSORBED, ALL_EXPANDED = 10**6, 1  # prefill_threshold

# FP8 activations: v_up hands on the noise of o_latent; that of q_nope moves a logit by as much of the logits' spread,
# and so a softmax weight by as much of itself. The two are independent, and so are the layers. A residual stream that
# were all attention would hand on all of it. The spread of these models, log-softmax over a row, is 0.37 and 0.21.
LOGITS_SPREAD = 0.5
FP8_LOGITS = FP8_FROBENIUS * math.sqrt((1 + LOGITS_SPREAD**2) * models.LAYERS)
# Two blocks a layer, in and out of each. Exact activations add the rounding of q and of v, as plain products do.
BF16_LOGITS = ROUNDING_FROBENIUS * math.sqrt(2 * 2 * models.LAYERS)
LOGITS = {"exact": BF16_LOGITS, "fp8": FP8_LOGITS}
each_mode = pytest.mark.parametrize("activations", LOGITS)


def relative_error(got, want) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture(scope="module", params=["DeepseekV3", "DeepseekV2"])
def exact_model(request):
    return models.build(request.param, rope_parameters=models.YARN if request.param == "DeepseekV3" else None)


@pytest.fixture
def fp8_model(tmp_path):
    """A dense fp32 model on weights that its FP8 checkpoint holds exactly, a bf16 copy, and the checkpoint."""
    exact = models.build(**models.DENSE)
    models.quantize_kv_b_proj(exact, tmp_path)
    return exact, copy.deepcopy(exact).bfloat16(), tmp_path


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("threshold", [2, ALL_ABSORBED], ids=["decode", "prefill_too"])
def test_enable_unquantized_generates_the_same_tokens(exact_model, monkeypatch, cache, beams, threshold):
    options = {"num_beams": beams, **({"cache_implementation": "static"} if cache == "static" else {})}
    inputs = models.prompt()
    want = models.generate(exact_model, inputs, **options)
    assert len(want[:, 7:].unique()) > 8, "a model that repeats itself shows nothing"
    calls = models.absorbed_calls(monkeypatch)
    with enabled(exact_model, weights="unquantized", prefill_threshold=threshold), calls as calls:
        got = models.generate(exact_model, inputs, **options)
    assert torch.equal(got, want)
    assert calls == [7] * (models.LAYERS * (threshold > 7)) + [1] * (15 * models.LAYERS)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_enable_unquantized_prefills_in_chunks(exact_model, monkeypatch, cache):
    inputs, options = models.prompt(), {"prefill_chunk_size": 3, "cache_implementation": cache}
    want = models.generate(exact_model, inputs, **options)
    calls = models.absorbed_calls(monkeypatch)
    with enabled(exact_model, weights="unquantized", prefill_threshold=ALL_ABSORBED), calls as calls:
        got = models.generate(exact_model, inputs, **options)
    assert torch.equal(got, want)
    assert calls[: 3 * models.LAYERS] == [3] * (2 * models.LAYERS) + [1] * models.LAYERS


@pytest.mark.parametrize("padding", [0, 3])
def test_enable_unquantized_prefills_a_longer_static_cache(exact_model, padding):
    """Without padding transformers passes no mask here: causal from the top left, and the cache is longer."""
    inputs = models.prompt(padding=padding)

    def prefill():
        cache = StaticCache(exact_model.config, max_cache_len=19)
        return exact_model(**inputs, past_key_values=cache).logits[inputs["attention_mask"].bool()]

    with torch.no_grad(), enabled(exact_model, weights="unquantized", prefill_threshold=ALL_ABSORBED):
        got = prefill()
    with torch.no_grad():
        torch.testing.assert_close(got, prefill(), rtol=1e-4, atol=1e-4)


TINY = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24, "head_dim": 16}
FULL = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
FAMILIES = {
    "AXK1": {}, "BailingHybrid": FULL, "Glm4MoeLite": {}, "KimiLinear": FULL, "LongcatFlash": {}, "MiniCPM3": {},
    "Mistral4": {"head_dim": 32}, "Youtu": {},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_enable_unquantized_runs_other_mla_models(family, monkeypatch):
    if not hasattr(models.transformers, family + "Config"):
        pytest.skip(f"not yet in transformers {models.transformers.__version__}")
    model, inputs = models.build(family, **{**TINY, **FAMILIES[family]}), models.prompt(batch=2)
    want = models.generate(model, inputs)
    summary = enable(model, weights="unquantized", prefill_threshold=ALL_ABSORBED)
    with models.absorbed_calls(monkeypatch) as calls:
        got = models.generate(model, inputs)
    assert torch.equal(got, want) and not summary.skipped
    assert calls == [7] * len(summary.enabled) + [1] * (15 * len(summary.enabled))


@each_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_enable_logits_within_the_noise(fp8_model, dtype, activations):
    exact, model, checkpoint = fp8_model
    model, inputs = model.to(dtype), models.prompt()
    want = models.logits(exact, inputs)
    assert relative_error(models.logits(model, inputs), want) < BF16_LOGITS
    enable(model, activations=activations, checkpoint=checkpoint, prefill_threshold=ALL_ABSORBED)
    error = relative_error(models.logits(model, inputs), want)
    assert error < LOGITS[activations] and (error > BF16_LOGITS) == (activations == "fp8")
    models.attentions(model)[0].mla_fp8.w_uv_scale[1] *= 2  # one head of four
    assert relative_error(models.logits(model, inputs), want) > FP8_LOGITS


def test_enable_is_exact_unless_told(fp8_model):
    _, model, checkpoint = fp8_model
    results, inputs = [], models.prompt()
    for options in ({}, {"activations": "exact"}, {"activations": "fp8"}):
        with enabled(model, checkpoint=checkpoint, prefill_threshold=ALL_ABSORBED, **options):
            results.append(models.logits(model, inputs))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@each_mode
def test_enable_decodes_within_the_noise(fp8_model, monkeypatch, activations):
    exact, model, checkpoint = fp8_model
    inputs = models.prompt(padding=0)
    want = models.logits(exact, inputs).unflatten(0, (3, 7))[:, 4:]
    enable(model, activations=activations, checkpoint=checkpoint)
    cache, got = StaticCache(model.config, max_cache_len=9), []
    with torch.no_grad(), models.absorbed_calls(monkeypatch) as calls:
        for span in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7)):
            got.append(model(inputs["input_ids"][:, span], past_key_values=cache).logits[:, -1].float())
    assert calls[-2 * 3 :] == [1] * 6
    assert relative_error(torch.stack(got[1:], 1), want) < LOGITS[activations]


def test_enable_fp8_expanded_prefill_has_no_fp8_noise(fp8_model, monkeypatch):
    exact, model, checkpoint = fp8_model
    inputs = models.prompt()
    before = models.logits(model, inputs)
    enable(model, checkpoint=checkpoint)  # as many tokens as queries: expanding is always cheaper
    with models.absorbed_calls(monkeypatch) as calls:
        assert torch.equal(models.logits(model, inputs), before)
    assert calls == []


def test_enable_fp8_reads_the_checkpoint_raw(tmp_path):
    model = models.build(**models.DENSE)
    blocks = models.quantize_kv_b_proj(model, tmp_path)
    model.bfloat16()  # rounds the weights, but not the checkpoint's
    summary = enable(model, checkpoint=tmp_path)
    held = 0
    for layer, (value, scale) in zip(models.attentions(model), blocks, strict=True):
        heads, scales = value.unflatten(0, (models.HEADS, 256)), scale.unflatten(0, (models.HEADS, 2))
        assert torch.equal(layer.mla_fp8.w_uk.float(), heads[:, :128].mT.float())
        assert torch.equal(layer.mla_fp8.w_uv.float(), heads[:, 128:].float())
        assert torch.equal(layer.mla_fp8.w_uk_scale[:, :, 0], scales[:, 0])
        assert torch.equal(layer.mla_fp8.w_uv_scale[:, 0], scales[:, 1])
        held += value.nbytes + scale.nbytes
    assert summary.memory_bytes == held


@pytest.mark.parametrize("threshold, bound", [(ALL_ABSORBED, BF16_LOGITS), (ALL_EXPANDED, ROUNDING_FROBENIUS)])
def test_enable_fp8_runs_fp8_linear_without_its_kernels(monkeypatch, threshold, bound):
    monkeypatch.setattr(FP8Linear, "forward", lambda *_: pytest.fail("FP8Linear would fetch kernels from a hub"))
    dequantized, inputs = models.build(**models.DENSE), models.prompt()
    blocks = models.quantize_kv_b_proj(dequantized)
    want = models.logits(dequantized.bfloat16(), inputs)
    model = copy.deepcopy(dequantized)
    for layer, (value, scale) in zip(models.attentions(model), blocks, strict=True):
        layer.kv_b_proj = FP8Linear(512, value.shape[0], block_size=(128, 128))
        layer.kv_b_proj.weight.data, layer.kv_b_proj.weight_scale_inv.data = value, scale
    enable(model, prefill_threshold=threshold)
    assert relative_error(models.logits(model, inputs), want) < bound
    assert models.generate(model, inputs).shape == (3, 23)


def test_enable_under_autograd_runs_expanded():
    plain, inputs = models.build().bfloat16(), models.prompt()
    model = copy.deepcopy(plain)
    enable(model, prefill_threshold=ALL_ABSORBED)
    for m in (plain, model):
        m(**inputs, labels=inputs["input_ids"]).loss.backward()
    for (name, want), got in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None), name
        assert want.grad is None or torch.equal(got.grad, want.grad), name
    assert models.attentions(model)[0].kv_b_proj.weight.grad.norm() > 0


@pytest.mark.parametrize(
    "options", [{"activations": "exact"}, {"activations": "fp8"}, {"weights": "unquantized"}], ids=str
)
def test_enable_compiled_decode_step(options):
    model = models.build(**models.DENSE).bfloat16()
    enable(model, **options)
    ids, results = models.prompt(padding=0)["input_ids"], []
    for step in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        cache = StaticCache(model.config, max_cache_len=9)
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache)
            results.append(step(ids[:, 6:], past_key_values=cache).logits)
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    "device, lasts_absorbed",
    [("cpu", [0, 46, 77, 93, 98]), ("cuda", [0, 33, 55, 66, 69]), ("xpu", [0, 46, 77, 93, 98])],
)
def test_absorbed_is_cheaper_for_few_queries(device, lasts_absorbed):
    dims = (512, 128, 64, 128)
    for tokens, last in zip((1, 128, 512, 2048, 8192), lasts_absorbed, strict=True):
        absorbed = [
            s for s in range(1, tokens + 1) if absorbed_layer.absorbed_is_cheaper(s, tokens, *dims, device=device)
        ]
        assert absorbed == list(range(1, last + 1))


@pytest.mark.gpu
@each_mode
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_enable_then_move_to_a_gpu(fp8_model, cache, activations):
    exact, model, checkpoint = fp8_model
    enable(model, activations=activations, checkpoint=checkpoint, prefill_threshold=ALL_ABSORBED)
    inputs = models.prompt()
    want = models.logits(exact, inputs)
    model, inputs = model.cuda(), {name: tensor.cuda() for name, tensor in inputs.items()}
    assert relative_error(models.logits(model, inputs).cpu(), want) < LOGITS[activations]
    options = {"cache_implementation": "static"} if cache == "static" else {}
    assert models.generate(model, inputs, **options).shape == (3, 23)
    disable(model)
