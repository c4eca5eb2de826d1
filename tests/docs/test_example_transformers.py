"""The example in enable's docstring, and examples/transformers_generate.py on its own model and on a saved one."""

import doctest
import importlib.util
import re
from pathlib import Path

import mla_models as models
import pytest
import torch

from mla_fp8.integrations.transformers import enable

SCRIPT = Path(__file__).parents[2] / "examples" / "transformers_generate.py"
STEPS = 4


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("transformers_generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WAYS = ["expanded, fp32", "absorbed, fp32", "expanded, bf16", "exact activations", "fp8 activations"]
RANDOM = "random weights, random tokens"


def run(example, capsys, *arguments) -> str:
    assert example.main([*arguments, "--context", "16", "--steps", str(STEPS)]) == 0
    printed = capsys.readouterr().out
    ways = re.findall(r"^(.+): \[([\d, ]+)\], \d+\.\d steps/s$", printed, re.M)
    assert [name for name, _ in ways] == WAYS
    assert all(len(tokens.split(",")) == STEPS for _, tokens in ways) and ways[0][1] == ways[1][1]
    (same,) = re.findall(r"^the same tokens as expanded, fp32: (.+)$", printed, re.M)
    assert re.fullmatch(r"absorbed 100%, bf16 \d+%, exact \d+%, fp8 \d+%", same)
    return printed


def test_example_generates_with_the_model_it_builds(example, capsys):
    printed = run(example, capsys)
    assert f"{4 * 16 * (256 * 512 + 2 * 4 * 4) / 1e6:.1f} MB of FP8 weights" in printed and RANDOM in printed


def test_example_generates_with_a_saved_model(example, capsys, tmp_path):
    model = models.build(**models.DENSE)
    models.quantize_kv_b_proj(model, tmp_path / "fp8")
    model.save_pretrained(tmp_path / "fp32")
    printed = run(example, capsys, "--model", str(tmp_path / "fp32"), "--checkpoint", str(tmp_path / "fp8"))
    assert "enabled 2 layers: model.layers.{0-1}.self_attn" in printed and RANDOM not in printed


def test_example_exits_1_when_tokens_differ(example, monkeypatch, capsys):
    generate = example.generate
    monkeypatch.setattr(example, "generate", lambda name, *rest: generate(name, *rest) + ("absorbed" in name))
    assert example.main(["--context", "4", "--steps", "2"]) == 1


def test_enable_docstring_example_runs():
    (test,) = doctest.DocTestFinder().find(enable, "enable", globs={"torch": torch, "enable": enable})
    assert doctest.DocTestRunner().run(test).failed == 0 and len(test.examples) == 4
