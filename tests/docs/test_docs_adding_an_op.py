"""docs/adding_an_op.md names every file that has to know the name of an op."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding_an_op.md").read_text()
SOURCES = [*ROOT.glob("csrc/**/*.[ch]*"), *ROOT.glob("mla_fp8/*.py*"), *ROOT.glob("mla_fp8/cli/*.py"),
           *ROOT.glob("tests/c*.py"), *ROOT.glob("tests/support/faults.py"), ROOT / "CMakeLists.txt"]  # fmt: skip
COMMENTS = re.compile(r'//.*|#.*|"""(?:.|\n)*?"""|"[^"\n]* [^"\n]*"|`[^`]*`')  # and sentences in quotes
# They use an op as any caller might, have one as a default, or are a part of one's kernel.
CALLERS = {"mla_fp8/cli/bench.py", "mla_fp8/explanation.py", "csrc/config/config.h", "csrc/kernels/rope.cuh"}


@pytest.mark.parametrize("op", ["quantize_q_nope", "absorb_q", "v_up"])
def test_page_names_every_file_that_knows_an_op(op):
    camel = "".join(part.capitalize() for part in op.split("_"))
    named = re.compile(rf"\b(k?{op}|{op}_out|k?{camel}|{camel}Args)\b")
    knows = {str(path.relative_to(ROOT)) for path in SOURCES if named.search(COMMENTS.sub("", path.read_text()))}
    knows |= {str(path.relative_to(ROOT)) for path in SOURCES if path.stem in (op, f"op_{op}", f"launch_{op}")}
    known = re.findall(r"[\w./<>]+\.(?:\w+)|CMakeLists\.txt", PAGE.replace("<op>", op))
    own_kernels = {name for name in knows if re.search(rf"kernels/{op}_\w+\.cuh", name)}
    missing = knows - set(known) - CALLERS - own_kernels
    assert not missing


def test_readme_leads_to_the_page_in_one_guess():
    text = (ROOT / "README.md").read_text()
    for path in (
        "docs/adding_an_op.md",
        "docs/layouts.md",
        "docs/troubleshooting.md",
        "csrc/config/tiles.h",
        "csrc/bindings/",
    ):
        assert path in text, path
