"""The examples in the docstrings of what is public run."""

import doctest
import importlib
import inspect

import public_api
import pytest
import torch

import mla_fp8

pytest.importorskip("transformers", "5.15", "an optional extra, which `make test` installs")

RUN_ELSEWHERE = {"register_shardings": "test_distributed", "enable": "test_example_transformers",
                 "register": "test_integration_sglang"}  # fmt: skip
NEED_NONE = {"disable", "enabled"}  # enable's is theirs
SPECIFICATION = "mla_fp8.reference"  # one line each: the code is the documentation
PUBLIC = [(module, name) for module, names in public_api.names().items() for name in names if module != SPECIFICATION]
FUNCTIONS = [row for row in PUBLIC if inspect.isfunction(public_api.value_of(*row)) and "." not in row[1]]
WITH_EXAMPLE = [row for row in FUNCTIONS if row[1] not in {*RUN_ELSEWHERE, *NEED_NONE}]


@pytest.mark.parametrize("module, name", [*WITH_EXAMPLE, ("mla_fp8", "AbsorbedWeights"), ("mla_fp8", "BlockFp8Weight")])
def test_public_function_example_runs(module, name):
    value = getattr(importlib.import_module(module), name)
    names = {"torch": torch, **vars(mla_fp8), **vars(importlib.import_module(module))}
    examples = [test for test in doctest.DocTestFinder().find(value, name, globs=names) if test.examples]
    assert examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert all(runner.run(test).failed == 0 for test in examples)
