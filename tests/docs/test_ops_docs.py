"""Docstrings of what is public: the examples run, and each names arguments, shapes, dtypes and errors."""

import dataclasses
import doctest
import importlib
import inspect
import re

import public_api
import pytest
import torch

import mla_fp8

pytest.importorskip("transformers", "5.15", "an optional extra, which `make test` installs")

EXAMPLES_RUN_ELSEWHERE = {"register_shardings": "test_distributed", "enable": "test_example_transformers",
                          "register": "test_integration_sglang"}  # fmt: skip
NEEDS_NO_EXAMPLE = {"disable", "enabled"}  # enable's is theirs
SPECIFICATION = "mla_fp8.reference"  # one line each: the code is the documentation
PUBLIC = [(module, name) for module, names in public_api.names().items() for name in names]
PYTHON = [(module, name) for module, name in PUBLIC if inspect.isfunction(public_api.value_of(module, name))]
FUNCTIONS = [(module, name) for module, name in PYTHON if module != SPECIFICATION]
TOP_LEVEL = [row for row in FUNCTIONS if "." not in row[1]] + [("mla_fp8", "AbsorbedWeights")]
SHAPE = re.compile(r"\[[BHMNSVRDKP][\w*()+/]*, ?[\w*()+/, ]+\]")
DTYPE = re.compile(r"\b(bf16|fp16|fp32|bfloat16|float16|float32|float8_e4m3fn|e4m3|of q's dtype|of q_nope's dtype)\b")
BY_REFERENCE = re.compile(r"\b(as (for|in) `\w+`|of the shapes below)")
RAISES = re.compile(r"\b(ValueError|RuntimeError|ImportError|nothing)\b|\bas `\w+`")
each = lambda rows: pytest.mark.parametrize("module, name", rows, ids=lambda part: part)  # noqa: E731


def text_of(module, name) -> str:
    return inspect.getdoc(public_api.value_of(module, name)) or ""


def section(text: str, heading: str) -> str:
    """From `heading:` to the next one."""
    found = re.search(rf"\b{heading}:(.*?)(\n\n|\n[A-Z][a-z]+: |\n[A-Z][a-z]+:\n|(?<=\.) Raises: |\Z)", text, re.DOTALL)
    return found[1].strip() if found else ""


def entries(text: str) -> dict[str, str]:
    """Args -> what is said of each; `a, b: ...` says it of both."""
    rows = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8,}.*)*)", "    " + section(text, "Args"), re.MULTILINE)
    return {name: said for names, said in rows for name in names.split(", ")}


def parameters(module, name):
    given = inspect.signature(public_api.value_of(module, name)).parameters
    return [parameter for parameter in given.values() if parameter.name not in ("self", "cls")]


@each([row for row in TOP_LEVEL if row[1] not in (*EXAMPLES_RUN_ELSEWHERE, *NEEDS_NO_EXAMPLE)])
def test_public_function_example_runs(module, name):
    value = getattr(importlib.import_module(module), name)
    names = {"torch": torch, **vars(mla_fp8), **vars(importlib.import_module(module))}
    examples = [test for test in doctest.DocTestFinder().find(value, name, globs=names) if test.examples]
    assert examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert all(runner.run(test).failed == 0 for test in examples)


@each(PUBLIC)
def test_public_name_has_a_sentence(module, name):
    lines = text_of(module, name).split("\n")
    first = next((line for line in lines if line and not line.startswith(f"{name}(")), "")  # pybind11 puts a signature
    form = r"\S.*" if module == SPECIFICATION else r"[A-Z$].*\."
    assert re.fullmatch(form, first), f"{first!r} must be a whole sentence"


@each(FUNCTIONS)
def test_public_function_documents_every_argument(module, name):
    said = entries(text_of(module, name))
    missing = [parameter.name for parameter in parameters(module, name) if parameter.name not in said]
    assert not missing
    assert not set(said) - {parameter.name for parameter in parameters(module, name)} - {"options"}


@each(FUNCTIONS + [("mla_fp8", "AbsorbedWeights")])
def test_public_tensors_have_shapes_and_dtypes(module, name):
    for parameter in parameters(module, name):
        if "Tensor" not in str(parameter.annotation) or parameter.name == "source":  # source: any of two classes
            continue
        said = entries(text_of(module, name))[parameter.name]
        if BY_REFERENCE.search(said) or parameter.name in ("out_scale", "mask"):  # one element; broadcast
            continue
        assert SHAPE.search(said), f"{parameter.name}: no shape in {said!r}"
        assert DTYPE.search(said) or parameter.name == "out", f"{parameter.name}: no dtype in {said!r}"


@each([row for row in FUNCTIONS if "." not in row[1] or parameters(*row)])
def test_public_function_says_what_it_returns_and_raises(module, name):
    text, returned = text_of(module, name), inspect.signature(public_api.value_of(module, name)).return_annotation
    raises = section(text, "Raises")
    assert RAISES.search(raises), f"Raises: {raises!r} must name the errors, or say nothing"
    said = section(text, "Returns")
    assert said, "Returns: must say what, or nothing"
    if "Tensor" in str(returned):
        assert SHAPE.search(said) and DTYPE.search(said.replace("dtype", "")) or "q's dtype" in said, said


@each([row for row in TOP_LEVEL if row[0] == "mla_fp8" and row[1] != "AbsorbedWeights"])
def test_op_has_every_section(module, name):
    for heading in ("Args", "Returns", "Raises", "Notes", "Source", "Example"):
        assert section(text_of(module, name), heading), heading


@each([row for row in PUBLIC if dataclasses.is_dataclass(public_api.value_of(*row))])
def test_public_dataclass_names_its_fields(module, name):
    value = public_api.value_of(module, name)
    assert {field.name for field in dataclasses.fields(value)} <= set(re.findall(r"\w+", inspect.getsource(value)))
