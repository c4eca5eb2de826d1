"""Code in the README runs, and the files that the documents name exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        names: dict[str, torch.Tensor] = {}
        exec(block, names)
        assert names["q"].shape == (4, 16, 576) and names["v"].shape == (4, 16, 128)


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_files_named_in_docs_exist(document):
    named = re.findall(r"\b(?:mla_fp8|csrc|docs|tests|examples|benchmarks)/[\w./]*\w", document.read_text())
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing
