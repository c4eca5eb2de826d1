"""Code in the README runs."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_python_runs():
    blocks = python_blocks()
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    assert names["q"].shape == (4, 16, 576) and names["v"].shape == (4, 16, 128)


def test_readme_enables_a_transformers_model(tmp_path):
    models = pytest.importorskip("mla_models")
    (block,) = (text for text in python_blocks() if "enable(model)" in text)
    model = models.build()
    models.quantize_kv_b_proj(model, tmp_path)
    model = model.bfloat16()
    one_or_the_other = [line for line in block.splitlines() if line.startswith("enable(")]
    assert len(one_or_the_other) == 3
    for line in one_or_the_other:
        names: dict[str, Any] = {"model": model}
        exec(block.splitlines()[0] + "\n" + line.replace("DeepSeek-V3", str(tmp_path)), names)
        with pytest.raises(ValueError, match="enabled"):
            names["enable"](model)
        importlib.import_module(names["enable"].__module__).disable(model)
