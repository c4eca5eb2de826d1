"""What the ops' Python functions make of arguments that no op of torch could take."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def mode(op: str, activations: str) -> dict[str, bool]:
    """What the dispatcher is told of `activations`: nothing where it is the default, since an argument costs time."""
    if activations == "exact":
        return {}
    if activations == "fp8":
        return {"fp8_activations": True}
    raise RuntimeError(f"{op}: activations must be 'exact' or 'fp8', got {activations!r}")


def names_types(function: Callable[P, R]) -> Callable[P, R]:
    """Where torch refuses a call, say which argument is no tensor; a call that it takes pays for no check."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, TypeError):
            require_tensors(function.__name__, args, kwargs)
            raise

    return call


def require_tensors(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Of the arguments that the op's schema has as tensors, those that were given are."""
    schema = getattr(torch.ops.mla_fp8, op).default._schema.arguments
    names = [argument.name for argument in schema if "Tensor" in str(argument.type)]
    for name, value in [*zip(names, args, strict=False), *((n, kwargs[n]) for n in names if n in kwargs)]:
        if value is not None and not isinstance(value, Tensor):
            hint = ": torch.tensor([scale], device=...) is one" if isinstance(value, (int, float)) else ""
            raise RuntimeError(f"{op}: {name} must be a Tensor, got {type(value).__name__} {value!r:.40}{hint}")
