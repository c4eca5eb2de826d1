"""What `convert` cannot take is said before a byte is written, in a shell user's words; older files stay."""

import os
import re

import pytest
import torch
from checkpoints import config, kv_b_proj, write_checkpoint

from mla_fp8 import AbsorbedWeights
from mla_fp8.__main__ import main
from mla_fp8.cli import convert
from mla_fp8.weights.file import write_weights

NAME = "model.layers.{layer}.self_attn.kv_b_proj"
KIMI = "language_model." + NAME
MTP = 3


def tensors_of(rng, layers, name=NAME):
    tensors = {}
    for layer in layers:
        base = name.format(layer=layer)
        tensors[f"{base}.weight"], tensors[f"{base}.weight_scale_inv"] = kv_b_proj(rng)
    return tensors


@pytest.fixture
def with_mtp(rng, tmp_path):
    plain = {NAME.format(layer=MTP) + ".weight": torch.randn(512, 512, generator=rng).bfloat16()}
    return write_checkpoint(tmp_path / "mtp", tensors_of(rng, range(3)) | plain, config())


@pytest.fixture
def run(capsys, tmp_path):
    def call(directory, *arguments):
        capsys.readouterr()
        code = main(["convert", str(directory), str(tmp_path / "out"), *arguments])
        return code, *capsys.readouterr()

    return call


def files(tmp_path):
    return sorted(os.listdir(tmp_path / "out"))


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_mtp_layer_is_refused_at_once(run, with_mtp, tmp_path, force):
    old = tmp_path / "out" / "layer_000.safetensors"
    if force:
        old.parent.mkdir()
        old.write_bytes(b"earlier")
    code, out, err = run(with_mtp, *force)
    assert (code, out) == (1, "")
    assert err == (
        "error: convert: layer 3 must be float8_e4m3fn, got BF16 "
        "(--quantize-bf16 takes others, with loss; --layers 0-2 leaves them out)\n"
    )
    assert old.read_bytes() == b"earlier" if force else not old.parent.exists()


def test_options_of_the_message_work(run, with_mtp, tmp_path):
    assert run(with_mtp, "--layers", "0-2")[0] == 0
    assert files(tmp_path) == [f"layer_{layer:03}.safetensors" for layer in range(3)]
    assert run(with_mtp, "--quantize-bf16", "--force")[0] == 0
    got = AbsorbedWeights.load(tmp_path / "out" / f"layer_{MTP:03}.safetensors")
    want = AbsorbedWeights.from_safetensors(with_mtp, MTP, quantize_bf16=True)
    for a, b in zip(got.dequantize(), want.dequantize(), strict=True):
        assert torch.equal(a, b)


def test_bad_scale_of_a_later_layer_leaves_older_files(run, rng, tmp_path):
    tensors = tensors_of(rng, range(2))
    tensors[NAME.format(layer=1) + ".weight_scale_inv"][0, 0] = float("inf")
    directory = write_checkpoint(tmp_path / "m", tensors, config())
    old = tmp_path / "out" / "layer_000.safetensors"
    old.parent.mkdir()
    old.write_bytes(b"earlier")
    code, _, err = run(directory, "--force")
    assert code == 1 and "layers.1.self_attn.kv_b_proj.weight_scale_inv must be finite" in err
    assert files(tmp_path) == [old.name] and old.read_bytes() == b"earlier"


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_end_in_the_middle_leaves_older_files(run, rng, tmp_path, monkeypatch, error):
    directory = write_checkpoint(tmp_path / "m", tensors_of(rng, range(2)), config())
    assert run(directory)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "layer_000.safetensors").write_bytes(b"earlier")
    before["layer_000.safetensors"] = b"earlier"

    def fail_at_the_second(path, tensors, origin):
        if origin["layer"] == 1:
            raise error
        write_weights(path, tensors, origin)

    monkeypatch.setattr(convert, "write_weights", fail_at_the_second)
    assert run(directory, "--force")[0] != 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_difference_leaves_older_files(run, rng, tmp_path, monkeypatch):
    directory = write_checkpoint(tmp_path / "m", tensors_of(rng, range(2)), config())
    assert run(directory)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    load = convert._load

    def wrong(given, layer):
        weights = load(given, layer)
        weights.w_uk.view(torch.uint8)[0, 0, 0] ^= layer
        return weights

    monkeypatch.setattr(convert, "_load", wrong)
    code, out, _ = run(directory, "--force")
    assert code == 1 and "1 verified" in out and "is as it was" in out
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("arguments", [[], ["--name", KIMI]], ids=["default", "named"])
def test_names_of_a_multimodal_model(run, rng, tmp_path, arguments):
    model = {"model_type": "kimi_k25", "text_config": config()}
    directory = write_checkpoint(tmp_path / "m", tensors_of(rng, range(2), KIMI), model)
    code, out, err = run(directory, *arguments)
    assert (code, err) == (0, "") and "2 verified" in out


def test_missing_name_lists_the_nearest(run, rng, tmp_path):
    directory = write_checkpoint(tmp_path / "m", tensors_of(rng, range(2), "thinker." + NAME), config())
    code, _, err = run(directory)
    nearest = "thinker." + NAME.format(layer=0) + ".weight"
    assert code == 1 and f"it has no {NAME}.weight; the nearest names are {nearest}" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp-size", "0"], "convert: --tp-size must be an integer >= 1, got 0"),
        (["--tp-rank", "2", "--tp-size", "2"], "convert: --tp-rank must be less than --tp-size = 2, got 2"),
        (["--name", "{x}"], "convert: --layers must be in the checkpoint, got none: it has no {x}.weight"),
    ],
)
def test_messages_name_the_options_of_the_shell(run, with_mtp, tmp_path, arguments, message):
    code, _, err = run(with_mtp, *arguments)
    assert code == 1 and err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_no_message_names_an_argument_of_python(run, rng, tmp_path):
    weight = NAME.format(layer=0) + ".weight"
    pairs = {weight: torch.ones(512, 512).to(torch.float8_e4m3fn)}
    for case, extra in {"none": {}, "row": {weight + "_scale": torch.ones(512, 1)}}.items():
        code, _, err = run(write_checkpoint(tmp_path / case, pairs | extra, config()))
        assert code == 1 and err.startswith("error: convert: ")
        assert not re.search(r"from_safetensors|quantize_bf16|tp_size|=True", err), err


def test_check_weights_takes_bf16_and_names(capsys, rng, tmp_path):
    plain = {KIMI.format(layer=1) + ".weight": torch.randn(512, 512, generator=rng).bfloat16()}
    directory = write_checkpoint(tmp_path / "m", plain, {"text_config": config()})
    arguments = ["check", "--device", "cpu", "--weights", str(directory), "--layer", "1", "--name", KIMI]
    capsys.readouterr()
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "(--quantize-bf16 quantizes others, with loss), got torch.bfloat16" in err and "=True" not in err
    assert main([*arguments, "--quantize-bf16"]) == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--op v_up_quantized --s 4 --out-dtype bfloat16", "explain: --out-dtype must be float8_e4m3fn"),
        ("--op quantize_q_nope --s 4 --m-alignment 0", "explain: --m-alignment must be at least 1, got 0"),
        ("--op absorb_q --s 4 --align 0", "explain: --align must be in [2, 16], got 0; --align must be a power of 2"),
        ("--op absorb_q --s 4 --n 100", "explain: --n must be a multiple of 128"),
    ],
)
def test_explain_names_the_options_of_the_shell(capsys, words, text):
    capsys.readouterr()
    assert main(["explain", *words.split()]) == 1
    assert capsys.readouterr().err.startswith(f"error: {text}")
