"""What each op returns, without running it: shapes, strides and dtypes for torch.compile and torch.export."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mla_fp8.formats import E4M3, GROUP, SCALE_ROWS_MULTIPLE


def _check(op: str, inputs: dict[str, Tensor]) -> None:
    """The op's own errors where a traced function would otherwise get past them: devices and gradients."""
    (first, like), *_ = inputs.items()
    for name, tensor in inputs.items():
        if tensor.device != like.device:
            raise RuntimeError(f"{op}: {name} must be on the device of {first}, {like.device}, got {tensor.device}")
    for name, tensor in inputs.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op}: {name} must not require grad, as this op has no backward (call it under torch.no_grad()), "
                "got requires_grad=True"
            )


def _fake(result: Callable[..., Any]) -> Callable[..., Any]:
    """Describe the op of that name, and its overload that writes, which returns nothing; both check their tensors."""
    op = result.__name__

    def register(overload: str, returns: Callable[..., Any]) -> None:
        names = [argument.name for argument in getattr(getattr(torch.ops.mla_fp8, op), overload)._schema.arguments]

        @torch.library.register_fake(f"mla_fp8::{op}" if overload == "default" else f"mla_fp8::{op}.{overload}")
        def _(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            _check(op, {name: value for name, value in given.items() if isinstance(value, Tensor)})
            return returns(*args, **kwargs)

    register("default", result)
    register("out", lambda *args, **kwargs: None)
    return result


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


@_fake
def quantize_q_nope(
    q_nope: Tensor, *, m_alignment: int = 256, amax_floor: float = 1e-4, zero_pad: bool = True
) -> tuple[Tensor, Tensor]:
    s, h, k = q_nope.shape
    m = _round_up(s, m_alignment)
    rows = _round_up(m, SCALE_ROWS_MULTIPLE)
    q_val = q_nope.new_empty((h, m, k), dtype=E4M3)
    q_scale = q_nope.new_empty_strided((h, m, k // GROUP), (rows * (k // GROUP), 1, rows), dtype=torch.float32)
    return q_val, q_scale


@_fake
def bmm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, m: int | None = None) -> Tensor:
    return a.new_empty((a.shape[0], a.shape[1] if m is None else m, b.shape[1]), dtype=torch.bfloat16)


@_fake
def absorb_q(
    q_nope: Tensor,
    w_uk: Tensor,
    w_uk_scale: Tensor,
    q_pe: Tensor | None = None,
    out_scale: Tensor | None = None,
    *,
    fp8_activations: bool = False,
) -> Tensor:
    s, h, _ = q_nope.shape
    width = w_uk.shape[1] + (0 if q_pe is None else q_pe.shape[2])
    return q_nope.new_empty((s, h, width), dtype=q_nope.dtype if out_scale is None else E4M3)


@_fake
def v_up(
    o_latent: Tensor,
    w_uv: Tensor,
    w_uv_scale: Tensor,
    out_scale: Tensor | None = None,
    *,
    fp8_activations: bool = False,
) -> Tensor:
    s, h, _ = o_latent.shape
    return o_latent.new_empty((s, h, w_uv.shape[1]), dtype=o_latent.dtype if out_scale is None else E4M3)


@_fake
def v_up_quantized(
    o_latent: Tensor, w_uv: Tensor, w_uv_scale: Tensor, *, fp8_activations: bool = False
) -> tuple[Tensor, Tensor]:
    s, h, _ = o_latent.shape
    v_val = o_latent.new_empty((s, h * w_uv.shape[1]), dtype=E4M3)
    v_scale = o_latent.new_empty_strided((s, h), (1, _round_up(s, SCALE_ROWS_MULTIPLE)), dtype=torch.float32)
    return v_val, v_scale
