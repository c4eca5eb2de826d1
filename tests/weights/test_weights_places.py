"""Where from_safetensors finds a checkpoint and its tensors: links, the hub, multimodal models; and its hints."""

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import INDEX, LAYER, SCALE, WEIGHT, config, dequantized, head_rows, kv_b_proj, write_checkpoint
from helpers import assert_same_bits

from mla_fp8 import AbsorbedWeights
from mla_fp8.weights.checkpoint import layers

KIMI = "language_model.model.layers.{layer}.self_attn.kv_b_proj"
SAVED_BY_TRANSFORMERS = "model.language_model.layers.{layer}.self_attn.kv_b_proj"


@pytest.fixture
def pair(rng):
    return kv_b_proj(rng)


def assert_is(weights, pair):
    for got, want in zip(weights.dequantize(), head_rows(dequantized(*pair), 2, 128), strict=True):
        assert_same_bits(got, want, "dequantized")


def nested(pair, directory, name, key="text_config", inside=True):
    """A multimodal model's: the dims in a config of their own, quantization_config there or outside."""
    text, base = config(), name.format(layer=LAYER)
    outer = {"model_type": "kimi_k25", "vision_config": {}, key: text}
    if not inside:
        outer["quantization_config"] = text.pop("quantization_config")
    return write_checkpoint(directory, {f"{base}.weight": pair[0], f"{base}.weight_scale_inv": pair[1]}, outer)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("key", ["text_config", "language_config"])
@pytest.mark.parametrize("name", [KIMI, SAVED_BY_TRANSFORMERS])
def test_multimodal_models_load(tmp_path, pair, name, key, inside):
    directory = nested(pair, tmp_path / "m", name, key, inside)
    assert_is(AbsorbedWeights.from_safetensors(directory, LAYER, name=name), pair)
    assert_is(AbsorbedWeights.from_safetensors(directory, LAYER), pair)
    assert layers(directory) == layers(directory, name) == [LAYER]
    for other in {KIMI, SAVED_BY_TRANSFORMERS} - {name}:  # a module's name, where the file has the other
        assert_is(AbsorbedWeights.from_safetensors(directory, LAYER, name=other), pair)


def test_block_size_of_the_text_config_counts(tmp_path, pair):
    directory = nested(pair, tmp_path / "m", KIMI)
    outer = json.loads((directory / "config.json").read_text())
    outer["text_config"]["quantization_config"]["weight_block_size"] = [64, 64]
    (directory / "config.json").write_text(json.dumps(outer))
    with pytest.raises(ValueError, match=re.escape("weight_block_size must be [128, 128], got [64, 64]")):
        AbsorbedWeights.from_safetensors(directory, LAYER)


def test_missing_name_lists_the_nearest(tmp_path, pair):
    tensors = {f"model.layers.{i}.mlp.experts.{j}.up_proj.weight": torch.zeros(1) for i in range(3) for j in range(9)}
    tensors |= {"thinker.layers.3.attn.kv_b_proj.weight": pair[0]}
    directory = write_checkpoint(tmp_path / "m", tensors, config())
    message = f"{LAYER}: there is no {WEIGHT}; the nearest names are thinker.layers.3.attn.kv_b_proj.weight"
    with pytest.raises(ValueError, match=re.escape(message)):
        AbsorbedWeights.from_safetensors(directory, LAYER)


@pytest.fixture
def snapshot(tmp_path, pair):
    """As huggingface_hub keeps it: files of a snapshot are links to blobs."""
    cache = tmp_path / "models--deepseek-ai--DeepSeek-V3"
    root, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    root.parent.mkdir(parents=True)
    blobs.mkdir()
    write_checkpoint(root, dict(zip((WEIGHT, SCALE), pair, strict=True)), config())
    for path in list(root.iterdir()):
        blob = path.rename(blobs / f"sha-{path.name.replace('.', '')}")
        path.symlink_to(Path("..", "..", "blobs", blob.name))
    return root


@pytest.mark.parametrize("kind", [str, Path])
def test_snapshot_of_links_loads(snapshot, pair, kind):
    assert_is(AbsorbedWeights.from_safetensors(kind(snapshot), LAYER), pair)


def test_missing_shard_is_named(snapshot):
    shard = snapshot / json.loads((snapshot / INDEX).read_text())["weight_map"][WEIGHT]
    shard.resolve().unlink()
    message = f"{shard.name} must be in {snapshot}, as its index says, got a link to ../../blobs/"
    with pytest.raises(ValueError, match=re.escape(message)):
        AbsorbedWeights.from_safetensors(snapshot, LAYER)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} must be in .* got no such file .*`hf download` again"):
        AbsorbedWeights.from_safetensors(snapshot, LAYER)


def test_folder_of_the_cache_says_where_the_checkpoint_is(snapshot):
    (snapshot.parents[1] / "config.json").write_text(json.dumps(config()))
    with pytest.raises(ValueError, match="the checkpoint is one of the directories in snapshots/"):
        AbsorbedWeights.from_safetensors(snapshot.parents[1], LAYER)


def test_hub_id_says_how_to_get_a_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`hf download deepseek-ai/DeepSeek-V3` makes a local copy"):
        AbsorbedWeights.from_safetensors("deepseek-ai/DeepSeek-V3", 0)
    with pytest.raises(ValueError, match="must be an existing directory") as raised:
        AbsorbedWeights.from_safetensors("/a/b", 0)
    assert "hub" not in str(raised.value)
