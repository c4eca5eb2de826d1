"""What each op returns, without running it: shapes, strides and dtypes for torch.compile and torch.export."""

import torch
from torch import Tensor

from mla_fp8.formats import E4M3, GROUP, SCALE_ROWS_MULTIPLE


def _check(op: str, **inputs: Tensor | None) -> None:
    """The op's own errors where a traced function would otherwise get past them: devices and gradients."""
    (first, like), *_ = inputs.items()
    assert like is not None
    for name, tensor in inputs.items():
        if tensor is not None and tensor.device != like.device:
            raise RuntimeError(f"{op}: {name} must be on the device of {first}, {like.device}, got {tensor.device}")
    for name, tensor in inputs.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op}: {name} must not require grad, as this op has no backward (call it under torch.no_grad()), "
                "got requires_grad=True"
            )


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


@torch.library.register_fake("mla_fp8::quantize_q_nope")
def _(
    q_nope: Tensor, *, m_alignment: int = 256, amax_floor: float = 1e-4, zero_pad: bool = True
) -> tuple[Tensor, Tensor]:
    _check("quantize_q_nope", q_nope=q_nope)
    s, h, k = q_nope.shape
    m = _round_up(s, m_alignment)
    rows = _round_up(m, SCALE_ROWS_MULTIPLE)
    q_val = q_nope.new_empty((h, m, k), dtype=E4M3)
    q_scale = q_nope.new_empty_strided((h, m, k // GROUP), (rows * (k // GROUP), 1, rows), dtype=torch.float32)
    return q_val, q_scale


@torch.library.register_fake("mla_fp8::bmm")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, m: int | None = None) -> Tensor:
    _check("bmm", a=a, a_scale=a_scale, b=b, b_scale=b_scale)
    return a.new_empty((a.shape[0], a.shape[1] if m is None else m, b.shape[1]), dtype=torch.bfloat16)


@torch.library.register_fake("mla_fp8::absorb_q")
def _(
    q_nope: Tensor, w_uk: Tensor, w_uk_scale: Tensor, q_pe: Tensor | None = None, out_scale: Tensor | None = None
) -> Tensor:
    _check("absorb_q", q_nope=q_nope, w_uk=w_uk, w_uk_scale=w_uk_scale, q_pe=q_pe, out_scale=out_scale)
    s, h, _ = q_nope.shape
    width = w_uk.shape[1] + (0 if q_pe is None else q_pe.shape[2])
    return q_nope.new_empty((s, h, width), dtype=q_nope.dtype if out_scale is None else E4M3)


@torch.library.register_fake("mla_fp8::v_up")
def _(o_latent: Tensor, w_uv: Tensor, w_uv_scale: Tensor, out_scale: Tensor | None = None) -> Tensor:
    _check("v_up", o_latent=o_latent, w_uv=w_uv, w_uv_scale=w_uv_scale, out_scale=out_scale)
    s, h, _ = o_latent.shape
    return o_latent.new_empty((s, h, w_uv.shape[1]), dtype=o_latent.dtype if out_scale is None else E4M3)


@torch.library.register_fake("mla_fp8::v_up_quantized")
def _(o_latent: Tensor, w_uv: Tensor, w_uv_scale: Tensor) -> tuple[Tensor, Tensor]:
    _check("v_up_quantized", o_latent=o_latent, w_uv=w_uv, w_uv_scale=w_uv_scale)
    s, h, _ = o_latent.shape
    v_val = o_latent.new_empty((s, h * w_uv.shape[1]), dtype=E4M3)
    v_scale = o_latent.new_empty_strided((s, h), (1, _round_up(s, SCALE_ROWS_MULTIPLE)), dtype=torch.float32)
    return v_val, v_scale


def _register_out(op: str) -> None:
    names = [argument.name for argument in getattr(torch.ops.mla_fp8, op).out._schema.arguments]

    @torch.library.register_fake(f"mla_fp8::{op}.out")
    def _(*args: object, **kwargs: object) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        _check(op, **{name: value for name, value in given.items() if isinstance(value, Tensor)})


for _op in ("quantize_q_nope", "bmm", "absorb_q", "v_up", "v_up_quantized"):
    _register_out(_op)
