"""The code of docs/*.md runs, page by page from top to bottom, and the tensors that a page draws are as drawn."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from mla_fp8.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if "```python" in path.read_text()]
BLOCK = re.compile(r"```(\w+)( gpu)?\n(.*?)```", re.DOTALL)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "e4m3": torch.float8_e4m3fn}
# name  [shape]  dtype  strides (...)  offset n
DRAWN = re.compile(r"^(\w+) +\[([\d, ]+)\] +(\w+) +strides \(([\d, ]+)\)(?: +offset (\d+))?", re.MULTILINE)
DRAWN_IN_LAYOUTS = 20


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def blocks(page: Path, language: str, gpu: bool = False) -> list[str]:
    """Those of a language, from top to bottom; with `gpu` also those that are marked as in ```python gpu."""
    found = BLOCK.findall(page.read_text())
    return [text for name, on_gpu, text in found if name == language and (gpu or not on_gpu)]


@torch.no_grad()
def run(page: Path, gpu: bool = False) -> dict:
    """The names that the page's code leaves behind."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    module = types.ModuleType(f"page_{page.stem}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)  # where torch.compile looks for a function's globals
        for number, code in enumerate(blocks(page, "python", gpu), 1):
            exec(compile(code, f"{page.name}, block {number}", "exec"), vars(module))
    return vars(module)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs(page, monkeypatch, tmp_path):
    if page.stem == "integrations":
        pytest.importorskip("transformers", "5.15", "an optional extra, which `make test` installs")
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.gpu
def test_integrations_run_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(ROOT / "docs" / "integrations.md", gpu=True)["result"].isfinite().all()


def test_layouts_are_as_drawn():
    page = ROOT / "docs" / "layouts.md"
    names = run(page)
    drawn = [found for text in blocks(page, "text") for found in DRAWN.findall(text)]
    assert len(drawn) == DRAWN_IN_LAYOUTS
    for name, shape, dtype, strides, offset in drawn:
        tensor = names[name]
        got = tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.storage_offset()
        assert got == (numbers(shape), DTYPES[dtype], numbers(strides), int(offset or 0)), name


def test_configuration_prints_what_explain_prints(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    page = (ROOT / "docs" / "configuration.md").read_text()
    (command,) = re.findall(r"^ {4}python -m mla_fp8 (explain .*)$", page, re.MULTILINE)
    assert main(command.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = "".join(f"    {line}".rstrip() + "\n" for line in lines)
    assert printed in page
