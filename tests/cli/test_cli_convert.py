"""`python -m mla_fp8 convert` and the files that it writes."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from checkpoints import config, kv_b_proj, write_checkpoint
from helpers import assert_same_bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mla_fp8 import AbsorbedWeights
from mla_fp8.__main__ import main
from mla_fp8.cli import convert, integer_ranges, ranges_text
from mla_fp8.weights.checkpoint import layers
from mla_fp8.weights.file import write_weights

LAYERS = (0, 1, 2, 11)
HEADS = 4


@pytest.fixture
def checkpoint(rng, tmp_path):
    tensors = {"model.embed_tokens.weight": torch.zeros(3)}
    for layer in LAYERS:
        base = f"model.layers.{layer}.self_attn.kv_b_proj"
        tensors[f"{base}.weight"], tensors[f"{base}.weight_scale_inv"] = kv_b_proj(rng, heads=HEADS)
    return write_checkpoint(tmp_path / "checkpoint", tensors, config(heads=HEADS))


@pytest.fixture
def run(capsys, checkpoint, tmp_path):
    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()  # the seed's line
        code = main(["convert", str(checkpoint), str(tmp_path / "out"), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def names(tmp_path):
    return sorted(os.listdir(tmp_path / "out")) if (tmp_path / "out").exists() else []


def assert_same_weights(got, want):
    for name, buffer in want.named_buffers():
        assert_same_bits(getattr(got, name).view(torch.uint8), buffer.contiguous().view(torch.uint8), name)


def test_convert_writes_every_layer(run, checkpoint, tmp_path):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert names(tmp_path) == [f"layer_{layer:03}.safetensors" for layer in LAYERS]
    for layer in LAYERS:
        got = AbsorbedWeights.load(tmp_path / "out" / f"layer_{layer:03}.safetensors")
        assert_same_weights(got, AbsorbedWeights.from_safetensors(checkpoint, layer))
    assert out.count("PASS") == len(LAYERS) and "4 verified" in out
    size_bytes = (tmp_path / "out" / "layer_000.safetensors").stat().st_size
    assert f"{size_bytes:,}" in out


def test_convert_table_fits_80_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    table = run()[1].split("\n\n")[0].splitlines()
    assert max(map(len, table)) <= 80


def test_convert_writes_one_rank_of_some_layers(run, checkpoint, tmp_path):
    code, out, _ = run("--layers", "1-2", "--tp-rank", "1", "--tp-size", "2", "--json")
    assert code == 0
    rows = json.loads(out)
    assert [(row["layer"], row["heads"], row["verified"]) for row in rows] == [(1, 2, True), (2, 2, True)]
    for row in rows:
        path = tmp_path / "out" / row["file"]
        assert path.stat().st_size == row["bytes"]
        assert_same_weights(
            AbsorbedWeights.load(path), AbsorbedWeights.from_safetensors(checkpoint, row["layer"], 1, 2)
        )
        with safe_open(path, framework="pt") as file:
            origin = {"class": "AbsorbedWeights", "layer": row["layer"], "tp_rank": 1, "tp_size": 2}
            assert json.loads(file.metadata()["mla_fp8"]) == origin


def test_converted_file_is_a_state_dict(run, checkpoint, tmp_path):
    assert run("--layers", "11")[0] == 0
    module = AbsorbedWeights.from_bf16(torch.zeros(HEADS * 256, 512), num_heads=HEADS)
    module.load_state_dict(load_file(tmp_path / "out" / "layer_011.safetensors"))
    assert_same_weights(module, AbsorbedWeights.from_safetensors(checkpoint, 11))


def test_converted_file_has_the_usual_permissions(run, tmp_path):
    assert run("--layers", "0")[0] == 0
    (tmp_path / "plain").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("plain", "out/layer_000.safetensors")]
    assert modes[0] == modes[1]


def test_convert_overwrites_only_with_force(run, tmp_path):
    assert run("--layers", "2")[0] == 0
    path = tmp_path / "out" / "layer_002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(b"the user's own")
    code, out, err = run()
    assert (code, out) == (1, "")
    assert (
        err == "error: convert: OUT must not hold layer_002.safetensors yet (--force overwrites), got 1 files there\n"
    )
    assert names(tmp_path) == ["layer_002.safetensors"] and path.read_bytes() == b"the user's own"
    assert run("--force")[0] == 0
    assert path.read_bytes() == whole


def test_convert_rejects_layers_that_are_not_there(run, tmp_path):
    code, _, err = run("--layers", "1,7-8")
    assert code == 1 and "--layers must be in the checkpoint, got [7, 8]: it has layers 0-2,11" in err
    assert names(tmp_path) == []


def test_convert_rejects_a_name_that_is_not_there(run):
    code, _, err = run("--name", "layers.{layer}.wkv_b")
    assert code == 1 and "it has no layers.{layer}.wkv_b.weight" in err


def test_convert_rejects_what_is_no_checkpoint(capsys, tmp_path):
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "convert: DIR must hold model.safetensors.index.json or model.safetensors" in capsys.readouterr().err


def test_convert_needs_leave_to_quantize(capsys, rng, tmp_path):
    weight = torch.randn(HEADS * 256, 512, generator=rng).bfloat16()
    tensors = {"model.layers.0.self_attn.kv_b_proj.weight": weight}
    checkpoint = write_checkpoint(tmp_path / "bf16", tensors, config(heads=HEADS), shards=0)
    arguments = ["convert", str(checkpoint), str(tmp_path / "out")]
    assert main(arguments) == 1
    assert capsys.readouterr().err == (
        "error: convert: layer 0 must be float8_e4m3fn, got BF16 (--quantize-bf16 takes others, with loss)\n"
    )
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--quantize-bf16"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    got = AbsorbedWeights.load(tmp_path / "out" / "layer_000.safetensors")
    assert_same_weights(got, AbsorbedWeights.from_bf16(weight, HEADS))


def test_convert_asks_for_space_before_it_writes(run, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    code, _, err = run()
    assert code == 1 and "OUT must have 3.15 MB of free space, got 1 MB" in err
    assert names(tmp_path) == []


def flip_bit(tensors):
    tensors["w_uv"].view(torch.uint8)[3, 100, 7] ^= 1


def change_scale(tensors):
    tensors["w_uk_scale"][0, 1, 0] += 1


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (flip_bit, "w_uv: 1 bytes differ, the first at [3, 100, 7]: got "),
        (change_scale, "w_uk_scale: "),
        (lambda tensors: tensors.pop("w_uk"), "path must hold w_uk, w_uk_scale, w_uv, w_uv_scale, got "),
    ],
    ids=["bit", "scale", "tensor"],
)
def test_convert_verification_finds_damage(run, monkeypatch, damage, text):
    def write_damaged(path, tensors, origin):
        write_weights(path, tensors, origin)
        written = load_file(path)
        damage(written)
        save_file(written, path)

    monkeypatch.setattr(convert, "write_weights", write_damaged)
    code, out, _ = run("--layers", "0")
    assert code == 1 and "DIFFERS" in out and "0 verified" in out
    assert text in " ".join(out.split())


def test_convert_compares_with_the_checkpoint_and_not_with_its_own_loader(run, monkeypatch):
    """A loader that cuts wrongly writes and reads the same wrong bytes."""
    right = convert._load

    def wrong(given, layer):
        weights = right(given, layer)
        weights.w_uk.view(torch.uint8)[0, 0, 0] ^= 1
        return weights

    monkeypatch.setattr(convert, "_load", wrong)
    code, out, _ = run("--layers", "0")
    assert code == 1 and "kv_b_proj: 1 bytes differ, the first at [0, 0]" in out


def test_write_that_fails_leaves_what_was_there(monkeypatch, tmp_path):
    weights = AbsorbedWeights.from_bf16(torch.ones(256, 512), num_heads=1)
    path = tmp_path / "one.safetensors"
    path.write_bytes(b"before")

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_weights(path, weights.state_dict())
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["one.safetensors"]


def test_load_rejects_files_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="path must be an existing file"):
        AbsorbedWeights.load(tmp_path / "none")
    (tmp_path / "broken").write_bytes(b"{")
    with pytest.raises(ValueError, match="path must be a whole safetensors file"):
        AbsorbedWeights.load(tmp_path / "broken")
    save_file({"w": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="path must hold w_uk, w_uk_scale, w_uv, w_uv_scale, got w in"):
        AbsorbedWeights.load(tmp_path / "other")
    with pytest.raises(ValueError, match="write_weights: tensors must be named"):
        write_weights(tmp_path / "other", {"w": torch.zeros(1)})


def test_layers_of_a_checkpoint(checkpoint):
    assert layers(checkpoint) == list(LAYERS)


def test_ranges_are_read_and_written():
    assert integer_ranges("0,3-5,4,11") == [0, 3, 4, 5, 11]
    assert ranges_text([0, 3, 4, 5, 11]) == "0,3-5,11"
    assert ranges_text([0, 1]) == "0-1"


@pytest.mark.parametrize("text", ["", "x", "1,", "-1", "3-", "5-3", "1.5"])
def test_ranges_reject_other_text(text, capsys):
    with pytest.raises(SystemExit):
        main(["convert", "in", "out", f"--layers={text}"])
    assert "must be numbers and ranges like 0,3-5, got" in capsys.readouterr().err
