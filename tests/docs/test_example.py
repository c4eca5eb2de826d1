"""examples/mla_decode.py from the command line, on the checkpoint that it writes and on edited ones."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).parents[2] / "examples" / "mla_decode.py"
HEADS, HIDDEN, STEPS = 2, 256, 3
STEP = re.compile(r"^ +(\d+) +(\d\.\d\de-\d\d)((?: +\d+\.\d){5})$", re.MULTILINE)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("mla_decode", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkpoint(example, tmp_path):
    with torch.inference_mode():
        example.write_checkpoint(tmp_path, HEADS, HIDDEN)
    return tmp_path


def move_to_layer(directory: Path, layer: int) -> None:
    """Renames the tensors of layer 0."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    moved = {name: name.replace("layers.0.", f"layers.{layer}.") for name in index["weight_map"]}
    for shard in set(index["weight_map"].values()):
        tensors = {moved[name]: tensor.clone() for name, tensor in load_file(directory / shard).items()}
        save_file(tensors, directory / shard)
    index["weight_map"] = {moved[name]: shard for name, shard in index["weight_map"].items()}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--steps", STEPS, "--batch", 2, *arguments]
    return processes.run(command)


def test_example_decodes_the_layer_it_builds(example):
    result = run("--heads", HEADS, "--hidden", HIDDEN)
    assert result.returncode == 0, result.stderr
    steps = STEP.findall(result.stdout)
    assert [int(position) for position, _, _ in steps] == list(range(STEPS))
    errors = [float(error) for _, error, _ in steps]
    assert all(example.BF16_NOISE < error < example.error_bound(1.0) for error in errors), errors
    for stage in example.STAGES:
        assert re.search(rf"│ {stage} +│ \d+\.\d µs \(median\) +│", result.stdout), stage
    fp8_bytes = HEADS * (2 * 128 * 512 + 2 * 4 * 4)
    assert f"{fp8_bytes:,} bytes" in result.stdout
    assert f"{HEADS * 2 * 128 * 512 * 2:,} bytes (2.00x)" in result.stdout
    assert f"│ largest relative error     │ {max(errors):.2e}" in re.sub(" {2,}│", "     │", result.stdout)
    assert ": kept" in result.stdout


def test_example_takes_a_layer_of_a_checkpoint(checkpoint):
    move_to_layer(checkpoint, 4)
    result = run("--checkpoint", checkpoint, "--layer", 4)
    assert result.returncode == 0, result.stderr
    assert len(STEP.findall(result.stdout)) == STEPS
    assert f"num_heads={HEADS}" in result.stdout


def test_example_writes_the_published_format(checkpoint):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    shapes = {}
    for name, shard in index.items():
        with safe_open(checkpoint / shard, framework="pt") as file:
            whole = file.get_slice(name)
            shapes[name.removeprefix("model.layers.0.")] = (whole.get_dtype(), whole.get_shape())
    assert shapes == {
        "input_layernorm.weight": ("BF16", [HIDDEN]),
        "self_attn.q_a_proj.weight": ("F8_E4M3", [1536, HIDDEN]),
        "self_attn.q_a_proj.weight_scale_inv": ("F32", [12, 2]),
        "self_attn.q_a_layernorm.weight": ("BF16", [1536]),
        "self_attn.q_b_proj.weight": ("F8_E4M3", [HEADS * 192, 1536]),
        "self_attn.q_b_proj.weight_scale_inv": ("F32", [HEADS * 192 // 128, 12]),
        "self_attn.kv_a_proj_with_mqa.weight": ("F8_E4M3", [576, HIDDEN]),
        "self_attn.kv_a_proj_with_mqa.weight_scale_inv": ("F32", [5, 2]),
        "self_attn.kv_a_layernorm.weight": ("BF16", [512]),
        "self_attn.kv_b_proj.weight": ("F8_E4M3", [HEADS * 256, 512]),
        "self_attn.kv_b_proj.weight_scale_inv": ("F32", [HEADS * 2, 4]),
        "self_attn.o_proj.weight": ("F8_E4M3", [HIDDEN, HEADS * 128]),
        "self_attn.o_proj.weight_scale_inv": ("F32", [2, HEADS]),
    }


@pytest.mark.parametrize("buffer", ["w_uk_scale", "w_uv_scale"])
def test_example_exits_1_when_the_error_passes_its_bound(example, monkeypatch, capsys, buffer):
    load = example.AbsorbedWeights.from_safetensors

    def load_wrongly(*arguments):
        weights = load(*arguments)
        getattr(weights, buffer)[0].mul_(2)  # the scales of one head
        return weights

    monkeypatch.setattr(example.AbsorbedWeights, "from_safetensors", load_wrongly)
    arguments = ["--heads", str(HEADS), "--hidden", str(HIDDEN), "--steps", "8"]
    assert example.main(arguments) == 1
    assert ": BROKEN" in capsys.readouterr().out


def test_example_exits_1_for_nan(example, checkpoint, capsys):
    name = "model.layers.0.self_attn.o_proj.weight"
    shard = checkpoint / json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name].view(torch.uint8)[3, 5] = 0x7F
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, shard)
    assert example.main(["--checkpoint", str(checkpoint), "--steps", "2"]) == 1
    assert ": BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--checkpoint", "/nowhere"], "directory must be an existing directory, got '/nowhere'"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--heads", "two"], "argument --heads: invalid int value: 'two'"),
    ],
)
def test_example_rejects(example, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_example_runs_on_a_gpu():
    result = run("--heads", HEADS, "--hidden", HIDDEN, "--device", "cuda")
    assert result.returncode == 0, result.stderr
    assert len(STEP.findall(result.stdout)) == STEPS
