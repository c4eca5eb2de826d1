"""tests/support/lint.py finds what breaks a rule of the house."""

from pathlib import Path

import lint
import pytest

LONG = "    step();\n" * (lint.FUNCTION_LINES - 1)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """Writes a file of csrc into a house of its own, in which one of config and one of a kernel are clean."""
    monkeypatch.setattr(lint, "ROOT", tmp_path)
    monkeypatch.setattr(lint, "PAGES", [])
    monkeypatch.setattr(lint, "CSRC", [])

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (lint.PAGES if path.suffix == ".md" else lint.CSRC).append(path)
        return path

    write("csrc/kernels/grid.cuh", '#include "kernels/ptx/griddepcontrol.cuh"\n#include "constants.h"\n')
    write("csrc/config/cost.cpp", '#include "kernels/grid.cuh"\n// One sentence.\nint f(int x) {\n  return x;\n}\n')
    return write


@pytest.mark.parametrize(
    "rule, name, text",
    [
        ("wide_prose", "README.md", "word " * 21),
        ("wide_prose", "csrc/config/a.h", "// " + "word " * 21),
        ("wide_prose", "csrc/config/a.h", "int a;  // " + "word " * 21),
        ("long_functions", "csrc/cpu/a.cpp", "void f(const int& a, int b) {\n" + LONG + "}\n"),
        ("long_functions", "csrc/cpu/a.cpp", "template <int kN>\nvoid A<kN>::f() const {\n" + LONG + "}\n"),
        ("long_functions", "csrc/cpu/a.cpp", "struct A {\n  A() : a_(0) {\n" + LONG + "  }\n};\n"),
        ("includes_that_reach_up", "csrc/gpu/a.cpp", '#include "bindings/op.h"\n'),
        ("includes_that_reach_up", "csrc/config/a.cpp", '#include "gpu/driver.h"\n'),
        ("includes_that_reach_up", "csrc/kernels/a.cuh", '#include "cpu/gemm.h"\n'),
        ("includes_that_reach_up", "csrc/cpu/a.cpp", '#include "config/config.h"\n'),
        ("includes_that_reach_up", "csrc/a.h", '#include "types.h"\n#include "kernels/grid.cuh"\n'),
        ("includes_that_reach_up", "csrc/kernels/sm90/a.cuh", '#include "kernels/ptx/griddepcontrol.cuh"\n'),
        ("names_of_files", "README.md", "See csrc/config/gone.h for that.\n"),
        ("names_of_files", "README.md", "See [there](gone.md).\n"),
    ],
)
def test_lint_finds(house, rule, name, text):
    (house("docs/README.md", "")).touch()
    assert not list(getattr(lint, rule)())
    house(name, text)
    assert len(list(getattr(lint, rule)())) == 1


@pytest.mark.parametrize(
    "name, text",
    [
        ("README.md", "| a row | " + "word " * 21 + "|\n\n    indented " + "word " * 21),
        ("README.md", "```text\n" + "word " * 21 + "\n```\n"),
        ("csrc/config/a.h", "// S    64" + "  word" * 20),
        ("csrc/cpu/a.cpp", "void f() {\n" + LONG[:-10] + "}\nvoid g() {\n" + LONG[:-10] + "}\n"),
        ("csrc/cpu/a.cpp", "namespace a {\nstruct A {\n  void f();\n" + "  int a;\n" * 99 + "};\n}\n"),
    ],
)
def test_lint_allows(house, name, text):
    house(name, text)
    assert not [*lint.wide_prose(), *lint.long_functions()]


def test_lint_finds_imports_that_reach_up(tmp_path, monkeypatch):
    monkeypatch.setattr(lint, "ROOT", tmp_path)
    (tmp_path / "mla_fp8" / "cli").mkdir(parents=True)
    (tmp_path / "mla_fp8" / "cli" / "suite.py").write_text("from mla_fp8 import reference\n")
    (tmp_path / "mla_fp8" / "weights.py").write_text("from mla_fp8.reference import GROUP\n")
    (tmp_path / "mla_fp8" / "jit.py").write_text("def f():\n    import mla_fp8.cli.facts\n")
    said = list(lint.imports_that_reach_up())
    assert [line.split(":")[0] for line in said] == ["mla_fp8/jit.py", "mla_fp8/weights.py"]
