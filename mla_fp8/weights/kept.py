"""What a `BlockFp8Weight` does other than multiply: which functions leave it its FP8 parts, and which it refuses.

Those in KEPT get the ATen function and its arguments, and those in HOOKS the arguments of a Python function. They
answer NotImplemented where the call is not theirs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
KEPT: dict[Any, Callable[..., Any]] = {}  # ATen function -> what does it with parts
HOOKS: dict[Any, Callable[..., Any]] = {}  # Python function -> what is done first
NAME = "BlockFp8Weight"
Weight = Any  # BlockFp8Weight, which imports this
PRESERVED = (None, torch.preserve_format)


def _does(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        KEPT.update(dict.fromkeys(functions, body))
        return body

    return register


@_does(aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten._pin_memory.default)
def _same(function: Any, weight: Weight, *args: Any) -> Any:
    return weight._map(lambda part: function(part, *args))


@_does(aten.clone.default)
def _clone(function: Any, weight: Weight, *, memory_format: Any = None) -> Any:
    return weight._map(function) if memory_format in PRESERVED else NotImplemented


@_does(aten._to_copy.default)
def _to(function: Any, weight: Weight, *, dtype: Any = None, layout: Any = None, memory_format: Any = None,
        **where: Any) -> Any:  # fmt: skip
    if dtype in (None, weight._dtype) and layout in (None, torch.strided) and memory_format in PRESERVED:
        return weight._map(lambda part: function(part, **where))
    return NotImplemented


@_does(aten.transpose.int)
def _transpose(_: Any, weight: Weight, dim0: int, dim1: int) -> Any:
    swapped = {dim0 % 3, dim1 % 3}
    return weight._map(_as_it_is, swap=len(swapped) == 2) if swapped == {1, 2} or len(swapped) == 1 else NotImplemented


@_does(aten.permute.default)
def _permute(_: Any, weight: Weight, dims: Sequence[int]) -> Any:
    order = [dim % 3 for dim in dims]
    return weight._map(_as_it_is, swap=order == [0, 2, 1]) if order in ([0, 1, 2], [0, 2, 1]) else NotImplemented


@_does(aten.slice.Tensor)
def _slice(function: Any, weight: Weight, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if dim % 3 == 0:
        return weight._map(lambda part: function(part, 0, start, end, step))
    whole = start in (None, 0) and (end is None or end >= weight._shape[dim % 3]) and step == 1
    return weight._map(_as_it_is) if whole else NotImplemented


@_does(aten.view.default, aten._unsafe_view.default, aten.expand.default)
def _view(_: Any, weight: Weight, size: Sequence[int], **options: Any) -> Any:
    """matmul makes views that change nothing."""
    same = len(size) == 3 and all(new in (-1, old) for new, old in zip(size, weight._shape, strict=True))
    return weight._map(_as_it_is) if same else NotImplemented


@_does(aten.copy_.default)
def _copy(function: Any, weight: Weight, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(source, type(weight)):
        raise TypeError(
            f"{NAME}.copy_: source must be a BlockFp8Weight (update_ writes the FP8 weight and its scale), "
            f"got {type(source).__name__} of {source.dtype}"
        )
    if (weight._shape, weight._swapped) != (source._shape, source._swapped):
        raise ValueError(f"{NAME}.copy_: source must be of shape {weight._shape} and as transposed, "
                         f"got {source!r}")  # fmt: skip
    for mine, other in zip(weight._parts(), source._parts(), strict=True):
        function(mine, other, non_blocking)
    return weight


@_does(aten.is_pinned.default)
def _is_pinned(function: Any, weight: Weight, *args: Any) -> Any:
    return function(weight.weight, *args)


@_does(aten.record_stream.default)
def _record_stream(function: Any, weight: Weight, stream: Any) -> None:
    for part in weight._parts():
        function(part, stream)


@_does(aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
       aten.rand_like.default, aten.randn_like.default, aten.new_empty.default, aten.new_zeros.default,
       aten.new_ones.default, aten.new_full.default, aten.new_empty_strided.default)  # fmt: skip
def _made_like(function: Any, weight: Weight, *args: Any, **options: Any) -> Any:
    """No number of the weight is asked for, only what it looks like."""
    looks = {"dtype": weight._dtype, "device": weight.weight.device}
    return function(torch.empty_strided(weight._shape, weight._strides, **looks), *args, **options)


def _as_it_is(part: Tensor) -> Tensor:
    return part


def require_no_write(function: Any, args: Sequence[Any], kwargs: dict[str, Any], kind: type) -> None:
    """Raise TypeError if the ATen function would write into a weight."""
    if not function._schema.is_mutable:
        return
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            if any(isinstance(each, kind) for each in (given if isinstance(given, (list, tuple)) else [given])):
                raise TypeError(f"{NAME} must be written by update_(weight, scale), got {function}")


def _set_data(weight: Weight, value: Any) -> None:
    """`parameter.data = value`: torch would keep the old parts."""
    like = (weight._shape, weight._dtype, weight._swapped)
    if not isinstance(value, type(weight)) or like != (value._shape, value._dtype, value._swapped):
        got = value if isinstance(value, type(weight)) else f"{type(value).__name__} of {value.dtype}"
        raise TypeError(f"{NAME}.data must be a {NAME} like this one (update_ writes in place), got {got}")
    if weight.weight.device != value.weight.device:
        raise TypeError(f"{NAME}.data must be on {weight.weight.device}, got {value.weight.device}")
    weight.weight, weight.scale = value._parts()


def _set_requires_grad(weight: Weight, value: bool = True) -> Any:
    if value:
        raise TypeError(f"{NAME} must not require grad (nn.Parameter(weight, requires_grad=False)), got True")
    return NotImplemented


def _set_item(weight: Any, *_: Any) -> Any:
    """torch would write into a copy."""
    if hasattr(weight, "_parts"):  # else a plain tensor is written from a weight
        raise TypeError(f"{NAME} must be written by update_(weight, scale), got an assignment to a part of it")
    return NotImplemented


def _share_memory(weight: Weight) -> Weight:
    for part in weight._parts():
        part.share_memory_()
    return weight


HOOKS[Tensor.data.__set__] = _set_data  # type: ignore[attr-defined]
HOOKS[Tensor.requires_grad.__set__] = HOOKS[Tensor.requires_grad_] = _set_requires_grad  # type: ignore[attr-defined]
HOOKS[Tensor.__setitem__] = _set_item
HOOKS[Tensor.share_memory_] = _share_memory
