"""One valid call of every op and variant, for the tests that hold for all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import helpers
import pytest
import torch
from helpers import assert_same_bits, rand, randn, random_weight, strided
from torch import Tensor

import mla_fp8  # noqa: F401  loads the ops
from mla_fp8 import reference

OPS = torch.ops.mla_fp8
ROWS = (0, 1, 7, 63, 64, 65, 255, 256, 257, 1000)
# (S, H): every number of rows with few heads, every number of heads with few rows, and one tall problem.
SHAPES = [(s, 2) for s in ROWS] + [(s, h) for s in (1, 5) for h in (1, 3, 16)] + [(5, 128), (4097, 1)]
ROPE_DIM = 64
# What an op is told for the public functions' `activations`.
ACTIVATIONS: dict[str, dict[str, bool]] = {"exact": {}, "fp8": {"fp8_activations": True}}
OF_ACTIVATIONS = ("absorb_q", "v_up", "v_up_quantized")  # ops that have it


@dataclass(frozen=True)
class Case:
    op: str
    variant: str
    outs: dict[str, str]  # keyword of the .out overload -> layout of the view it is given
    make: Callable  # (rng, s, h, dtype, device) -> every argument by name

    def __str__(self):
        return f"{self.op}-{self.variant}" if self.variant else self.op

    @property
    def functional(self):
        return getattr(OPS, self.op).default

    @property
    def out(self):
        return getattr(OPS, self.op).out

    def arguments(self, rng, s=7, h=3, dtype=torch.bfloat16, device="cpu") -> dict:
        return self.make(rng, s, h, dtype, device)

    def call(self, arguments: dict) -> tuple[Tensor, ...]:
        results = self.functional(**arguments)
        return results if isinstance(results, tuple) else (results,)

    def assert_gives(self, arguments: dict, views: dict[str, Tensor], want) -> None:
        """The functional op and the writing overload give `want`, bit for bit."""
        got = self.call(arguments)
        self.out(**arguments, **views)
        for result, view, expected in zip(got, views.values(), want, strict=True):
            assert_same_bits(result, expected)
            assert_same_bits(view, expected)

    def out_views(self, results) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Poisoned strided views by keyword, shaped like the results, and the buffers that they lie in."""
        views, buffers = {}, []
        for (name, layout), result in zip(self.outs.items(), results, strict=True):
            view, buffer = strided(result.shape, *OUT_LAYOUTS[layout](result.shape), result.dtype, result.device)
            views[name] = view
            buffers.append(buffer)
        return views, buffers


OUT_LAYOUTS = {
    "rows": lambda shape: helpers.ROW_LAYOUTS["last_columns"](*shape),
    "scales": lambda shape: helpers.SCALE_LAYOUTS["odd"](*shape),
    "flat_rows": lambda shape: ((shape[1] + 16, 1), 16),
    "flat_scales": lambda shape: ((3, 3 * shape[0] + 1), 5),
}


def quantize_q_nope(rng, s, h, dtype, device):
    return {"q_nope": randn(rng, s, h, 128, dtype=dtype, device=device)}


def bmm(rng, s, h, dtype, device):
    a, a_scale = reference.quantize_q_nope(randn(rng, s, h, 128, dtype=dtype, device=device), m_alignment=4)
    b, b_scale = random_weight(rng, h, 512, 128, device)
    return {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale}


def bmm_with_m(rng, s, h, dtype, device):
    return bmm(rng, s, h, dtype, device) | {"m": s}


def absorb_q(rng, s, h, dtype, device, rope=False, fp8=False, activations="exact"):
    w_uk, w_uk_scale = random_weight(rng, h, 512, 128, device)
    arguments = {"q_nope": randn(rng, s, h, 128, dtype=dtype, device=device), "w_uk": w_uk, "w_uk_scale": w_uk_scale}
    if rope:
        arguments["q_pe"] = randn(rng, s, h, ROPE_DIM, dtype=dtype, device=device)
    if fp8:
        arguments["out_scale"] = rand(rng, 1, device=device) * 0.01 + 0.005
    return arguments | ACTIVATIONS[activations]


def v_up(rng, s, h, dtype, device, fp8=False, activations="exact"):
    w_uv, w_uv_scale = random_weight(rng, h, 128, 512, device)
    arguments = {"o_latent": randn(rng, s, h, 512, dtype=dtype, device=device), "w_uv": w_uv, "w_uv_scale": w_uv_scale}
    if fp8:
        arguments["out_scale"] = rand(rng, 1, device=device) * 0.01 + 0.005
    return arguments | ACTIVATIONS[activations]


def _with(make, **options):
    return lambda *arguments: make(*arguments, **options)


CASES = [
    Case("quantize_q_nope", "", {"val_out": "rows", "scale_out": "scales"}, quantize_q_nope),
    Case("bmm", "", {"c_out": "rows"}, bmm),
    Case("bmm", "m", {"c_out": "rows"}, bmm_with_m),
    Case("absorb_q", "", {"q_out": "rows"}, absorb_q),
    Case("absorb_q", "pe", {"q_out": "rows"}, _with(absorb_q, rope=True)),
    Case("absorb_q", "fp8", {"q_out": "rows"}, _with(absorb_q, fp8=True)),
    Case("absorb_q", "pe-fp8", {"q_out": "rows"}, _with(absorb_q, rope=True, fp8=True)),
    Case("v_up", "", {"v_out": "rows"}, v_up),
    Case("v_up", "fp8", {"v_out": "rows"}, _with(v_up, fp8=True)),
    Case("v_up_quantized", "", {"val_out": "flat_rows", "scale_out": "flat_scales"}, v_up),
    # Activations that are quantized, and become one term.
    Case("absorb_q", "pe-one_term", {"q_out": "rows"}, _with(absorb_q, rope=True, activations="fp8")),
    Case("v_up", "one_term", {"v_out": "rows"}, _with(v_up, activations="fp8")),
    Case("v_up_quantized", "one_term", {"val_out": "flat_rows", "scale_out": "flat_scales"},
         _with(v_up, activations="fp8")),
]  # fmt: skip
CASE = {str(case): case for case in CASES}
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_activations = pytest.mark.parametrize("activations", ACTIVATIONS)
each_shape = pytest.mark.parametrize("s,h", SHAPES)
# Of FP8 activations also every number of heads is tested by what has the bits of bmm.
each_shape_and_activations = pytest.mark.parametrize(
    "s,h,activations", [(*shape, "exact") for shape in SHAPES] + [(s, 2, "fp8") for s in ROWS]
)
