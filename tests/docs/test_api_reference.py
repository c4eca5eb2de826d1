"""`make docs` makes a page of every public module, which has every public name with its docstring."""

import html
import inspect
import re

import public_api
import pytest

pytest.importorskip("pdoc", reason="in the dev extra, which `make setup` installs")
pytest.importorskip("transformers", "5.15", "an optional extra, which `make test` installs")

NAMES = public_api.names()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    directory = tmp_path_factory.mktemp("docs")
    public_api.reference_script().main(str(directory))
    return directory


def words(text: str) -> str:
    """Without tags, Markdown's marks, or spaces, which a renderer may change."""
    return re.sub(r"[\s`*_\\]", "", html.unescape(re.sub(r"<[^>]*>", "", text)))


@pytest.mark.parametrize("module", NAMES)
def test_reference_has_every_public_name_with_its_docstring(pages, module):
    page = (pages / (module.replace(".", "/") + ".html")).read_text()
    shown, missing = words(page), []
    for name in NAMES[module]:
        first = (inspect.getdoc(public_api.value_of(module, name)) or "?").split("\n")[0].rstrip(".")
        if f'id="{name}"' not in page or words(html.escape(first)) not in shown:
            missing.append(name)
    assert not missing


def test_reference_first_page_leads_to_the_others(pages):
    assert "url=./mla_fp8.html" in (pages / "index.html").read_text()
    first = (pages / "mla_fp8.html").read_text()
    assert not [
        module for module in NAMES if module != "mla_fp8" and f'href="{module.replace(".", "/")}.html"' not in first
    ]
