"""The examples in the docstrings of the public functions run, and print what they say."""

import doctest
import inspect

import pytest
import torch

import mla_fp8
from mla_fp8.attention import attend_latents

FUNCTIONS = {name: value for name, value in vars(mla_fp8).items() if name in mla_fp8.__all__}
FUNCTIONS |= {"attend_latents": attend_latents}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_public_function_example_runs(name):
    examples = [
        test
        for test in doctest.DocTestFinder(exclude_empty=True).find(
            FUNCTIONS[name], name, globs={"torch": torch, **FUNCTIONS}
        )
        if test.examples
    ]
    assert examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert all(runner.run(test).failed == 0 for test in examples)


@pytest.mark.parametrize("name", sorted(n for n, value in FUNCTIONS.items() if inspect.isfunction(value)))
def test_public_function_documents_every_argument(name):
    text = inspect.getdoc(FUNCTIONS[name])
    for section in ("Args:", "Returns:", "Raises:", "Notes:", "Source:", "Example:"):
        assert section in text, section
    for parameter in inspect.signature(FUNCTIONS[name]).parameters:
        assert f"    {parameter}: " in text, parameter
