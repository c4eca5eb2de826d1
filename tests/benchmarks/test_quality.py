"""benchmarks/quality in seconds: its measures on known inputs, its cache, its variants on a hardly trained model."""

import dataclasses
import itertools
import json
import math
import sysconfig
from pathlib import Path

import mla_models  # noqa: F401  skips this file where there is no transformers
import pytest
import torch

from benchmarks.bench import tables
from benchmarks.quality import evaluate as quality
from benchmarks.quality import model as quality_model
from benchmarks.quality import variants

TEXT = b"def double(x):\n    return 2 * x\n\n\ndef half(y):\n    return y / 2\n\n\n" * 40
FP32_LOGITS = 1e-5  # of logits of about 1: two orders of the same sums, some hundred roundings of 2^-24


@pytest.fixture(scope="module")
def corpus():
    text = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)
    return quality_model.Corpus(text, text[:1000])


@pytest.fixture(scope="module")
def recipe():
    return quality_model.Recipe(hidden=64, heads=2, intermediate=64, context=32, batch=4, steps=12, warmup=2)


@pytest.fixture(scope="module")
def model(recipe, corpus):
    return quality_model.train(recipe, corpus.train)


@pytest.fixture(scope="module")
def blocks(corpus):
    return quality.blocks_of(corpus.held_out, 32, 5)


def log_p(*rows):
    return torch.tensor(rows).log()[None]


def test_nll_of_a_uniform_guess_is_log_v():
    log_p, targets = torch.zeros(3, 7, 256).log_softmax(-1), torch.randint(256, (3, 7))
    torch.testing.assert_close(quality.nll(log_p, targets), torch.full((3,), math.log(256)).double())


def test_nll_reads_the_targets_probability():
    got = quality.nll(log_p([0.5, 0.25, 0.25], [0.1, 0.1, 0.8]), torch.tensor([[1, 2]]))
    assert got.item() == pytest.approx(-(math.log(0.25) + math.log(0.8)) / 2)


def test_kl_is_zero_for_equals_and_known_for_others():
    p, q = log_p([0.5, 0.5], [0.9, 0.1]), log_p([0.25, 0.75], [0.9, 0.1])
    assert quality.kl(p, p).item() == 0
    assert quality.kl(p, q).item() == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert quality.kl(q, p).item() == pytest.approx((0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2)


def test_agreement_counts_equal_maxima():
    want = log_p([0.9, 0.1], [0.1, 0.9], [0.2, 0.8], [0.6, 0.4])
    assert quality.agreement(want, log_p([0.6, 0.4], [0.1, 0.9], [0.8, 0.2], [0.7, 0.3])).item() == 0.75


def test_error_is_of_the_mean():
    assert quality.error(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(math.sqrt(5 / 3) / 2)


def test_blocks_reach_from_end_to_end():
    text = torch.arange(100, dtype=torch.uint8)
    blocks = quality.blocks_of(text, 9, 4)
    assert blocks.tolist() == [list(range(begin, begin + 10)) for begin in (0, 30, 60, 90)]


def test_ngram_nll_on_known_text():
    text = torch.frombuffer(bytearray(b"ab" * 5000), dtype=torch.uint8)
    known = quality_model.Corpus(text, text)
    assert quality_model.ngram_nll(known, 1) == pytest.approx(math.log(2), abs=1e-3)
    assert quality_model.ngram_nll(known, 2) == pytest.approx(0, abs=1e-3)


def test_standard_library_holds_out_whole_files():
    corpus = quality_model.standard_library()
    train, held_out = (text.numpy().tobytes() for text in (corpus.train, corpus.held_out))
    root = Path(sysconfig.get_path("stdlib"))
    modules = [
        "ast",
        "bisect",
        "copy",
        "csv",
        "difflib",
        "enum",
        "heapq",
        "inspect",
        "pickle",
        "shutil",
        "typing",
        "uuid",
    ]
    for path in (root / f"{name}.py" for name in modules):
        assert (path.read_bytes() in train) != (path.read_bytes() in held_out), path
    assert 0.03 < len(held_out) / len(train) < 0.3
    assert (root / "encodings" / "aliases.py").read_bytes() not in train + held_out


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(quality_model.Recipe)])
def test_cache_key_changes_with_the_recipe(recipe, corpus, field):
    changed = dataclasses.replace(recipe, **{field: getattr(recipe, field) * 2 + 1})
    assert quality_model.cache_key(changed, corpus) != quality_model.cache_key(recipe, corpus)


def test_cache_key_changes_with_the_text_only(recipe, corpus):
    key = quality_model.cache_key(recipe, corpus)
    assert quality_model.cache_key(dataclasses.replace(recipe), dataclasses.replace(corpus)) == key
    for field in ("train", "held_out"):
        changed = getattr(corpus, field).clone()
        changed[3] += 1
        assert quality_model.cache_key(recipe, dataclasses.replace(corpus, **{field: changed})) != key


def test_training_learns_once(tmp_path, recipe, corpus):
    losses = []
    model, took = quality_model.trained(recipe, corpus, losses.append, tmp_path)
    assert len(losses) == recipe.steps and losses[-1] < losses[0] - 1
    again, took_then = quality_model.trained(recipe, corpus, lambda loss: pytest.fail("trained again"), tmp_path)
    assert took_then == took and set(took) == {"seconds", "processor_seconds"} and min(took.values()) > 0
    assert quality_model.weights_digest(again) == quality_model.weights_digest(model)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_training_is_deterministic(model, recipe, corpus):
    twin = quality_model.train(recipe, corpus.train)
    assert quality_model.weights_digest(twin) == quality_model.weights_digest(model)
    other = quality_model.train(dataclasses.replace(recipe, seed=1), corpus.train)
    assert quality_model.weights_digest(other) != quality_model.weights_digest(model)


def test_variants_leave_the_model_alone(model, blocks):
    before = quality_model.weights_digest(model)
    for run in (*variants.VARIANTS.values(), variants.checkpoint_fp32, variants.without_attention, variants.seeing(1)):
        quality.log_probabilities(run(model), blocks)
    variants.spread(model, 8)
    assert quality_model.weights_digest(model) == before
    assert not any(hasattr(layer, variants.NAME) for layer in variants.attentions(model))


def test_variants_run_absorbed_and_differ(model, blocks, monkeypatch):
    want = quality.log_probabilities(variants.hf_fp32(model), blocks)
    results = {}
    for name, run in variants.VARIANTS.items():
        with mla_models.absorbed_calls(monkeypatch) as calls:
            results[name] = quality.log_probabilities(run(model), blocks)
        assert calls == ([] if name.startswith("HF") else [32] * 2), name
    torch.testing.assert_close(results.pop("absorbed, fp32"), want, rtol=0, atol=FP32_LOGITS)
    assert torch.equal(results.pop("HF, fp32"), want)
    kls = {name: quality.mean(quality.kl(want, log_p)) for name, log_p in results.items()}
    assert min(kls.values()) > 0 and len(set(kls.values())) == len(kls)


def test_seeing_hides_what_is_further_away(model, blocks):
    whole = quality.log_probabilities(variants.hf_fp32(model), blocks)
    torch.testing.assert_close(quality.log_probabilities(variants.seeing(32)(model), blocks), whole, rtol=0, atol=1e-5)
    changed = blocks.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 256
    for use in (variants.seeing(1), variants.without_attention):
        before, after = (quality.log_probabilities(use(model), one) for one in (blocks, changed))
        assert torch.equal(before[:, 1:], after[:, 1:]) and not torch.equal(before[:, 0], after[:, 0])
        assert not torch.equal(before[:, 1:], whole[:, 1:])


@pytest.mark.parametrize("name", variants.SPREAD_VARIANTS)
def test_spread_is_seen_only_where_heads_share_a_scale(model, blocks, name):
    run = variants.VARIANTS[name]
    before, after = (quality.log_probabilities(run(variants.spread(model, n)), blocks) for n in (0, 16))
    assert torch.equal(before, after) == (not name.startswith("per-tensor"))


def test_per_tensor_rounds_with_one_scale():
    exact = torch.tensor([448.0, 1.0, -0.25, 2.0**-9, 0.0]) / 4
    assert torch.equal(variants.per_tensor(exact), exact)
    x = torch.randn(64, 64)
    error = (variants.per_tensor(x) - x).abs()
    scale = x.abs().max() / 448
    assert (error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * (1 + 1e-6)).all() and error.max() > 0
    assert variants.per_tensor(torch.tensor([2.0**12, 2.0**-8]))[1] == 0  # below half of 2^-9 of the scale


def test_requantizing_moves_blocks_as_a_whole(model):
    """What sits on e4m3's 8 mantissas already errs, at one ratio of scales, to the same side wherever it is equal."""

    def common_error(change):
        errors = []
        for layer in variants.attentions(change(model)):
            got, want = (
                weight.detach().unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2).flatten(2)
                for weight in (layer.kv_b_proj.weight, next(trained).kv_b_proj.weight)
            )
            errors.append(((got * want).sum(-1) / (want * want).sum(-1) - 1).flatten())
        return torch.cat(errors).square().mean().sqrt()

    trained = itertools.cycle(variants.attentions(model))
    block = common_error(variants.checkpoint_fp32)
    once = common_error(variants.tensor_once_fp32)
    twice = common_error(lambda m: variants.with_kv_b_proj(variants.hf_fp32(m), variants.per_tensor))
    assert twice > 3 * block and twice > 3 * once


def test_tables_show_what_was_measured(tmp_path, model, corpus):
    ticks = []
    rows = quality.measure(model, corpus, 32, 5, lambda: ticks.append(1))
    assert len(ticks) == quality.evaluations()
    facts = {"recipe": {"context": 32}, "parameters": 1234, "read_characters": 5678, "blocks": 5}
    facts |= {"train_seconds": 9, "train_processor_seconds": 17}
    facts |= {key: key for key in ("cpu", "capability", "torch", "transformers", "python", "commit", "date", "command")}
    record = {**facts, "threads": 2, "rows": [dataclasses.asdict(row) for row in rows]}
    (tmp_path / "quality.json").write_text(json.dumps(record))
    filled = tables.fill(
        "<!-- table: quality -->\n<!-- end -->\n<!-- table: quality_sentence -->\n<!-- end -->\n", tmp_path
    )
    ours, fp8 = (row for row in rows if "mla_fp8" in row.variant and row.octaves == 0)
    assert f"| **{ours.variant}** | **{ours.nll:.4f}** |" in filled
    assert f"{ours.kl:.1e} and {ours.agreement:.1%} with `enable(model)`" in filled
    assert f"{fp8.kl:.1e} and {fp8.agreement:.1%} with FP8\nactivations" in filled
    assert filled.count("| per-tensor FP8 weights | ") == 3 and "160 characters" in filled
    for column in ("2^8", "2^12", "2^16"):
        assert column in filled
    assert quality.table(rows, {}).row_count == len(rows)
