"""The cases of `check`: inputs of every op and variant, and what `mla_fp8.reference` makes of them."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mla_fp8 import reference
from mla_fp8.cli.compare import PRODUCT, same_bits, sum_error, within
from mla_fp8.formats import FP8_MAX

HEADS = 3
M_ALIGNMENT = 4
ROPE_DIM, NOPE_DIM, LORA_RANK, V_DIM = 64, 128, 512, 128  # DeepSeek-V3's
CONTENTS = ("normal", "outliers", "NaN rows")
SENTINEL = 0x5A  # the bytes around a view that an op writes
Arguments: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One point of the grid of inputs."""

    s: int
    dtype: torch.dtype
    content: str
    strided: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"S = {self.s}, {dtype}, {self.content}, {'strided' if self.strided else 'contiguous'}"


SETTINGS = [
    *(Setting(*point) for point in itertools.product((65,), (torch.bfloat16, torch.float16), CONTENTS, (False, True))),
    *(Setting(s, torch.bfloat16, "normal", True) for s in (0, 1, 7, 257)),
]

PLAIN: Any = {"device": "cpu", "dtype": torch.float32}  # whatever defaults are set


class Maker:
    """Tensors of one setting, from a seeded generator."""

    def __init__(self, setting: Setting, seed: int, device: str) -> None:
        self.setting, self.seed, self.device = setting, seed, device
        self.rng = torch.Generator("cpu").manual_seed(seed)

    def rows(self, *widths: int) -> list[Tensor]:
        """[S, H, width] each; strided: neighbours in one tensor, as q_nope and q_pe are."""
        s, dtype = self.setting.s, self.setting.dtype
        values = torch.randn(s, HEADS, sum(widths) + ROPE_DIM, generator=self.rng, **PLAIN)
        if self.setting.content == "outliers":
            values[:, :, :: NOPE_DIM - 1] *= 300
            values[::3, 1] = 0
        if self.setting.content == "NaN rows" and s:
            values[s // 2, 1, 5], values[s // 3, 2, -ROPE_DIM - 1] = float("nan"), float("inf")
        views = values.to(self.device, dtype).split([*widths, ROPE_DIM], dim=-1)[:-1]
        return [view if self.setting.strided else view.contiguous() for view in views]

    def weight(self, n: int, k: int) -> tuple[Tensor, Tensor]:
        """[H, n, k] e4m3 and its scales; strided: a part of the rows of one tensor, and scales transposed."""
        view, scale = _weight(n, k, self.seed, self.device)
        return (view, scale) if self.setting.strided else (view.contiguous(), scale.contiguous())

    def out_scale(self) -> Tensor:
        return torch.rand(1, generator=self.rng, **PLAIN).to(self.device) * 0.01 + 0.005

    @property
    def typical(self) -> bool:
        return self.setting.content == "normal"


@functools.lru_cache(maxsize=2)
def _weight(n: int, k: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    rng = torch.Generator("cpu").manual_seed(-1 - seed)  # by the rows' own, weights would be multiples of some of them
    values = (torch.randn(HEADS, n + 128, k, generator=rng, **PLAIN) * 80).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = (torch.rand(HEADS, k // 128, n // 128, generator=rng, **PLAIN) + 0.5) * 1e-3
    return values.to(device)[:, 128:], scale.to(device).mT


@dataclass(frozen=True)
class Variant:
    """An op with some of its optional arguments: `compare` returns what differs, or nothing."""

    op: str
    name: str
    outs: tuple[str, ...]  # arguments of the overload that writes into given views
    make: Callable[[Maker], Arguments]  # of the op in torch.ops
    compare: Callable[[Arguments, tuple[Tensor, ...], bool], str]

    def call(self, arguments: Arguments) -> tuple[Tensor, ...]:
        results = getattr(torch.ops.mla_fp8, self.op).default(**arguments)
        return results if isinstance(results, tuple) else (results,)

    def differences(self, maker: Maker) -> Iterator[str]:
        """What the op, called twice, and its overload get wrong."""
        arguments = self.make(maker)
        got = self.call(arguments)
        if wrong := self.compare(arguments, got, maker.typical):
            yield wrong
        for again, first in zip(self.call(arguments), got, strict=True):
            if wrong := same_bits(again, first):
                yield f"a second call gives other bits: {wrong}"
        yield from self._overload(arguments, got)

    def _overload(self, arguments: Arguments, want: tuple[Tensor, ...]) -> Iterator[str]:
        views, buffers = {}, []
        for name, result in zip(self.outs, want, strict=True):
            room = torch.empty(*result.shape[:-1], result.shape[-1] + 16, dtype=result.dtype, device=result.device)
            room.view(torch.uint8).fill_(SENTINEL)
            views[name] = room[..., : result.shape[-1]]
            buffers.append(room[..., result.shape[-1] :])
        getattr(torch.ops.mla_fp8, self.op).out(**arguments, **views)
        for (name, view), rest, result in zip(views.items(), buffers, want, strict=True):
            if wrong := same_bits(view, result):
                yield f"with {name}=: {wrong}"
            if (rest.contiguous().view(torch.uint8) != SENTINEL).any():
                yield f"with {name}=: it wrote beside the view"


def _quantize(m: Maker) -> Arguments:
    return {"q_nope": m.rows(NOPE_DIM)[0], "m_alignment": M_ALIGNMENT}


def _bmm(m: Maker) -> Arguments:
    a, a_scale = reference.quantize_q_nope(m.rows(NOPE_DIM)[0], m_alignment=M_ALIGNMENT)
    b, b_scale = m.weight(LORA_RANK, NOPE_DIM)
    return {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale, "m": m.setting.s}


def _absorb_q(m: Maker, pe: bool = False, fp8: bool = False) -> Arguments:
    q_nope, q_pe = m.rows(NOPE_DIM, ROPE_DIM)
    w_uk, w_uk_scale = m.weight(LORA_RANK, NOPE_DIM)
    given = {"q_nope": q_nope, "w_uk": w_uk, "w_uk_scale": w_uk_scale}
    return given | ({"q_pe": q_pe} if pe else {}) | ({"out_scale": m.out_scale()} if fp8 else {})


def _v_up(m: Maker, fp8: bool = False) -> Arguments:
    w_uv, w_uv_scale = m.weight(V_DIM, LORA_RANK)
    given = {"o_latent": m.rows(LORA_RANK)[0], "w_uv": w_uv, "w_uv_scale": w_uv_scale}
    return given | ({"out_scale": m.out_scale()} if fp8 else {})


def _compare_quantized(given: Arguments, got: tuple[Tensor, ...], typical: bool) -> str:
    want = reference.quantize_q_nope(given["q_nope"], given["m_alignment"])
    named = zip(("q_val", "q_scale"), got, want, strict=True)
    return next((f"{name}: {wrong}" for name, x, y in named if (wrong := same_bits(x, y))), "")


def _compare_bmm(given: Arguments, got: tuple[Tensor, ...], typical: bool) -> str:
    m = given["m"]
    a, a_scale = given["a"][:, :m].transpose(0, 1), given["a_scale"][:, :m].transpose(0, 1)
    error = sum_error(a, a_scale, given["b"], given["b_scale"]).transpose(0, 1)
    want = reference.bmm(**given, product=PRODUCT[a.device.type])
    return within(got[0], want, error, typical=typical)


def _compare_product(op: str) -> Callable[[Arguments, tuple[Tensor, ...], bool], str]:
    def compare(given: Arguments, got: tuple[Tensor, ...], typical: bool) -> str:
        want = _reference(op, given)
        error = torch.zeros(want.shape, dtype=torch.float64, device=want.device)  # q_pe: exact
        product = _product_error(given)
        error[..., : product.shape[-1]] = product
        if "out_scale" in given:
            error /= given["out_scale"].double()
        return within(got[0], want, error, typical=typical)

    return compare


def _compare_v_up_quantized(given: Arguments, got: tuple[Tensor, ...], typical: bool) -> str:
    want_val, want_scale = _reference("v_up_quantized", given)
    error = _product_error(given)
    amax_error = error.amax(-1) / FP8_MAX
    if wrong := within(got[1], want_scale, amax_error, typical=typical):
        return f"v_scale: {wrong}"
    if (got[0].shape, got[0].dtype) != (want_val.shape, want_val.dtype):
        return f"v_val: got {got[0].dtype} {list(got[0].shape)}, want {want_val.dtype} {list(want_val.shape)}"
    x, y = (val.double().view(error.shape) * scale.double()[..., None] for val, scale in (got, (want_val, want_scale)))
    wrong = within(x, y, error, typical=typical, step=y.abs() / 8 + want_scale.double()[..., None] * 2.0**-9)
    return f"v_val * v_scale: {wrong}" if wrong else ""


def _reference(op: str, given: Arguments) -> Any:
    """What mla_fp8.reference makes of the op's arguments."""
    tensors = {name: value for name, value in given.items() if name != "fp8_activations"}
    product = PRODUCT[next(iter(tensors.values())).device.type]
    return getattr(reference, op)(**tensors, activations=activations_of(given), product=product)


def _product_error(given: Arguments) -> Tensor:
    x, w, w_scale, *_ = given.values()
    return sum_error(*reference.keep_or_quantize(x, activations_of(given)), w, w_scale)


def activations_of(given: Arguments) -> str:
    return "fp8" if given.get("fp8_activations") else "exact"


def _with(make: Callable[..., Arguments], **options: bool) -> Callable[[Maker], Arguments]:
    return lambda maker: make(maker, **options)


def _in_both_modes(variant: Variant) -> list[Variant]:
    name = ", ".join(filter(None, (variant.name, "fp8 activations")))
    return [variant, replace(variant, name=name, make=lambda maker: {**variant.make(maker), "fp8_activations": True})]


_PRODUCTS = [
    Variant("absorb_q", "", ("q_out",), _absorb_q, _compare_product("absorb_q")),
    Variant("absorb_q", "q_pe", ("q_out",), _with(_absorb_q, pe=True), _compare_product("absorb_q")),
    Variant("absorb_q", "out_scale", ("q_out",), _with(_absorb_q, fp8=True), _compare_product("absorb_q")),
    Variant(
        "absorb_q", "q_pe, out_scale", ("q_out",), _with(_absorb_q, pe=True, fp8=True), _compare_product("absorb_q")
    ),
    Variant("v_up", "", ("v_out",), _v_up, _compare_product("v_up")),
    Variant("v_up", "out_scale", ("v_out",), _with(_v_up, fp8=True), _compare_product("v_up")),
    Variant("v_up_quantized", "", ("val_out", "scale_out"), _v_up, _compare_v_up_quantized),
]
VARIANTS = [
    Variant("quantize_q_nope", "", ("val_out", "scale_out"), _quantize, _compare_quantized),
    Variant("bmm", "", ("c_out",), _bmm, _compare_bmm),
    *itertools.chain.from_iterable(map(_in_both_modes, _PRODUCTS)),
]
