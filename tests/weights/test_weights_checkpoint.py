"""AbsorbedWeights.from_safetensors: one rank's rows of a DeepSeek-format checkpoint, or an error that says why not."""

import json
import re

import pytest
import safetensors
import torch
from checkpoints import INDEX, LAYER, SCALE, WEIGHT, config, dequantized, head_rows, kv_b_proj, write_checkpoint
from helpers import assert_same_bits, bits

from mla_fp8 import AbsorbedWeights


@pytest.fixture
def pair(rng):
    return kv_b_proj(rng, heads=4)


@pytest.fixture
def checkpoint(pair, tmp_path):
    other = {"model.norm.weight": torch.ones(8), "model.layers.0.self_attn.kv_b_proj.weight": pair[0].clone()}
    return write_checkpoint(tmp_path / "model", {WEIGHT: pair[0], SCALE: pair[1], **other}, config(heads=4))


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shards", [0, 1, 2, 3])
def test_from_safetensors_is_lossless(pair, tmp_path, shards):
    directory = write_checkpoint(tmp_path / "model", {WEIGHT: pair[0], SCALE: pair[1]}, config(heads=4), shards)
    weights = AbsorbedWeights.from_safetensors(str(directory), LAYER)
    for got, want in zip(weights.dequantize(), head_rows(dequantized(*pair), 4, 128), strict=True):
        assert_same_bits(got, want, "dequantized")


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_ranks_concatenate_to_the_whole(checkpoint, tp_size):
    whole = AbsorbedWeights.from_safetensors(checkpoint, LAYER)
    ranks = [AbsorbedWeights.from_safetensors(checkpoint, LAYER, rank, tp_size) for rank in range(tp_size)]
    for name, want in whole.named_buffers():
        got = torch.cat([bits(getattr(rank, name)) for rank in ranks])
        assert torch.equal(got, bits(want)), name


def test_only_the_rows_of_the_rank_are_read(checkpoint, monkeypatch):
    read, real_open = [], safetensors.safe_open

    class Slice:
        def __init__(self, name, inner):
            self.name, self.get_shape, self.get_dtype, self.inner = name, inner.get_shape, inner.get_dtype, inner

        def __getitem__(self, rows):
            read.append((self.name, rows.start, rows.stop))
            return self.inner[rows]

    class File:
        def __init__(self, *args, **kwargs):
            self.inner = real_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def get_slice(self, name):
            return Slice(name, self.inner.get_slice(name))

    monkeypatch.setattr(safetensors, "safe_open", File)
    AbsorbedWeights.from_safetensors(checkpoint, LAYER, tp_rank=2, tp_size=4)
    assert read == [(WEIGHT, 512, 768), (SCALE, 4, 6)]


def test_w_uv_is_a_view_of_the_mapped_file_that_writes_never_reach(checkpoint):
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    view = AbsorbedWeights.from_safetensors(checkpoint, LAYER)
    owned = AbsorbedWeights.from_safetensors(checkpoint, LAYER, copy_w_uv=True)
    assert owned.w_uv.untyped_storage().nbytes() == owned.w_uv.nbytes
    assert torch.equal(bits(view.w_uv), bits(owned.w_uv))
    view.update_(torch.randn(4 * 256, 512))
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


@pytest.mark.parametrize("stored", [torch.float8_e8m0fnu, torch.uint8, torch.float32])
def test_ue8m0_scales(pair, tmp_path, stored):
    codes = torch.randint(100, 140, pair[1].shape, dtype=torch.uint8)
    scale = 2.0 ** (codes.float() - 127) if stored == torch.float32 else codes.view(stored)
    directory = write_checkpoint(tmp_path / "m", {WEIGHT: pair[0], SCALE: scale}, config(heads=4, scale_fmt="ue8m0"))
    weights = AbsorbedWeights.from_safetensors(directory, LAYER, 1, 2)
    want = head_rows(dequantized(pair[0], 2.0 ** (codes.float() - 127)), 4, 128)
    for got, whole in zip(weights.dequantize(), want, strict=True):
        assert_same_bits(got, whole[2:], "dequantized")


def test_bf16_checkpoint_is_quantized_only_when_asked(tmp_path):
    plain = torch.randn(4 * 256, 512).bfloat16()
    bare = config(heads=4)
    del bare["quantization_config"]
    directory = write_checkpoint(tmp_path / "m", {WEIGHT: plain}, bare)
    message = f"{WEIGHT} must be float8_e4m3fn (quantize_bf16=True quantizes others, with loss), got torch.bfloat16"
    with pytest.raises(ValueError, match=re.escape(message)):
        AbsorbedWeights.from_safetensors(directory, LAYER)
    weights = AbsorbedWeights.from_safetensors(directory, LAYER, 1, 2, quantize_bf16=True)
    want = AbsorbedWeights.from_bf16(plain[512:], 2)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(weights.buffers(), want.buffers(), strict=True))


def test_other_tensor_names(pair, tmp_path):
    base = "language_model.model.layers.7.attn.kv_b"
    tensors = {base + ".weight": pair[0], base + ".weight_scale_inv": pair[1]}
    directory = write_checkpoint(tmp_path / "m", tensors, config(heads=4))
    name = "language_model.model.layers.{layer}.attn.kv_b"
    assert AbsorbedWeights.from_safetensors(directory, 7, name=name).num_heads == 4


@pytest.mark.parametrize(
    "call, message",
    [
        ({"layer": 4}, f"got 4: there is no {WEIGHT.replace('3', '4')}"),
        ({"layer": -1}, "layer must be an integer >= 0, got -1"),
        ({"layer": "3"}, "layer must be an integer >= 0, got '3'"),
        ({"tp_size": 0}, "tp_size must be an integer >= 1, got 0"),
        ({"tp_rank": 2, "tp_size": 2}, "tp_rank must be less than tp_size = 2, got 2"),
        ({"tp_rank": -1, "tp_size": 2}, "tp_rank must be an integer >= 0, got -1"),
        ({"directory": "/nowhere/at/all"}, "directory must be an existing directory, got '/nowhere/at/all'"),
    ],
)
def test_rejects_arguments(checkpoint, call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        AbsorbedWeights.from_safetensors(**{"directory": checkpoint, "layer": LAYER} | call)
    assert str(raised.value).startswith("from_safetensors: ")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": None}, "config.json's num_attention_heads must be an integer >= 1, got None"),
        ({"kv_lora_rank": "512"}, "config.json's kv_lora_rank must be an integer >= 1, got '512'"),
        ({"qk_nope_head_dim": 192}, "qk_nope_head_dim must be a multiple of 128"),
        ({"v_head_dim": 64}, "v_head_dim must be a multiple of 128"),
        (
            {"kv_lora_rank": 384},
            f"{WEIGHT} must have shape [1024, 384], as config.json's extents make it, got [1024, 512]",
        ),
        ({"num_attention_heads": 8}, f"{WEIGHT} must have shape [2048, 512]"),
        (
            {"quantization_config": {"weight_block_size": [64, 128]}},
            "weight_block_size must be [128, 128], got [64, 128]",
        ),
        ({"quantization_config": {"weight_block_size": None}}, "weight_block_size must be [128, 128], got None"),
        ({"quantization_config": {"weight_block_size": ""}}, "weight_block_size must be [128, 128], got ''"),
        ({"quantization_config": "fp8"}, "quantization_config must be a JSON object, got 'fp8'"),
    ],
)
def test_rejects_configs(checkpoint, changes, message):
    edit_config(checkpoint, **changes)
    with pytest.raises(ValueError, match=re.escape("from_safetensors: " + message)):
        AbsorbedWeights.from_safetensors(checkpoint, LAYER)


def test_rejects_missing_scale(pair, tmp_path):
    directory = write_checkpoint(tmp_path / "m", {WEIGHT: pair[0]}, config(heads=4))
    message = (
        f"from_safetensors: {SCALE} or .weight_scale must be in the checkpoint beside {WEIGHT} of type F8_E4M3, "
        "got no such tensor"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        AbsorbedWeights.from_safetensors(directory, LAYER)


def test_rejects_scales_of_other_blocks(pair, tmp_path):
    tensors = {WEIGHT: pair[0], SCALE: torch.ones(16, 8)}
    directory = write_checkpoint(tmp_path / "m", tensors, config(heads=4))
    with pytest.raises(ValueError, match=re.escape(f"{SCALE} must have shape [8, 4]") + r".*got F32 \[16, 8\]"):
        AbsorbedWeights.from_safetensors(directory, LAYER)


def test_rejects_other_fp8_formats(pair, tmp_path):
    tensors = {WEIGHT: pair[0].view(torch.uint8).view(torch.float8_e5m2), SCALE: pair[1]}
    directory = write_checkpoint(tmp_path / "m", tensors, config(heads=4))
    with pytest.raises(
        ValueError, match=re.escape(f"{WEIGHT} must be float8_e4m3fn, ") + r".*got F8_E5M2 \[1024, 512\]"
    ):
        AbsorbedWeights.from_safetensors(directory, LAYER)


def test_rejects_an_index_that_names_the_wrong_file(checkpoint):
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"][WEIGHT] = index["weight_map"][SCALE]
    (checkpoint / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=re.escape(f"from_safetensors: {WEIGHT} must be in model-00002")):
        AbsorbedWeights.from_safetensors(checkpoint, LAYER)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}", b"\xff\xfe"]
)
def test_rejects_broken_indexes(checkpoint, content):
    (checkpoint / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="from_safetensors: (weight_map|model.safetensors.index.json) must"):
        AbsorbedWeights.from_safetensors(checkpoint, LAYER)


@pytest.mark.parametrize("missing", ["config.json", INDEX, "model-00001-of-00002.safetensors"])
def test_rejects_missing_files(checkpoint, missing):
    (checkpoint / missing).unlink()
    with pytest.raises(ValueError, match=f"from_safetensors: .*{re.escape(missing)}"):
        AbsorbedWeights.from_safetensors(checkpoint, LAYER)


@pytest.mark.parametrize("kept", [0, 4, 60, 0.5, 0.999])
@pytest.mark.parametrize("shards", [0, 2])
def test_rejects_truncated_files(pair, tmp_path, kept, shards):
    directory = write_checkpoint(tmp_path / "m", {WEIGHT: pair[0], SCALE: pair[1]}, config(heads=4), shards)
    path = next(directory.glob("model*.safetensors" if shards == 0 else "model-00001*"))
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ValueError, match=f"from_safetensors: {path.name} must be a whole safetensors file"):
        AbsorbedWeights.from_safetensors(directory, LAYER)


def test_never_unpickles(checkpoint):
    (checkpoint / "model-00001-of-00002.safetensors").unlink()
    torch.save({WEIGHT: torch.zeros(1)}, checkpoint / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        AbsorbedWeights.from_safetensors(checkpoint, LAYER)
