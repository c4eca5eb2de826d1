"""Code in the README runs, and the files that the documents name exist."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    assert len(one_or_the_other) == 2
    for line in one_or_the_other:
        names: dict[str, Any] = {"model": model}
        exec(block.splitlines()[0] + "\n" + line.replace("DeepSeek-V3", str(tmp_path)), names)
        with pytest.raises(ValueError, match="enabled"):
            names["enable"](model)
        importlib.import_module(names["enable"].__module__).disable(model)


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_files_named_in_docs_exist(document):
    """op_<op>.cpp stands for every file of that form."""
    folders = "mla_fp8|csrc|docs|tests|examples|benchmarks|cmake|build_support"
    named = re.findall(rf"\b(?:{folders})/[\w./<>]*[\w>]", document.read_text())
    missing = [path for path in named if not any(ROOT.glob(re.sub(r"<\w+>", "*", path)))]
    assert not missing


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_links_between_docs_lead_somewhere(document):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text()):
        there = (document.parent / target) if target else document
        assert there.exists(), target
        headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_placeholders_stand_in_code(document):
    """Elsewhere Markdown takes <op> for HTML and shows nothing."""
    text = re.sub(r"```.*?```|^ {4}.*?$|`[^`]*`", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"<\w+>", text)


def test_docs_index_has_a_line_for_every_page():
    listed = re.findall(r"^\| \[([\w.]+)\]\(\1\) \| \S.*\|$", (ROOT / "docs" / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")
