"""`check --weights`: what each way of a product loses on a layer of the user's own checkpoint."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mla_fp8.cli.terminal import Terminal
from mla_fp8.formats import dequantize_blocks
from mla_fp8.ops import absorb_q, v_up
from mla_fp8.text import table, wrap
from mla_fp8.weights import AbsorbedWeights

TOKENS = 64
OUTLIER = 30
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    f"one column {OUTLIER}x": lambda x: torch.cat([x[..., :1] * OUTLIER, x[..., 1:]], dim=-1),
    "all positive": lambda x: x.abs(),
}
Way: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x, w and w_scale
LEGEND = (
    "Relative error (L2) against fp64 arithmetic on the checkpoint's blocks. exact, fp8: activations= of the op; "
    "torch.bmm: bf16 products on the blocks dequantized to bf16; rounding: fp64 rounded to bf16, the least there is."
)
# Exact activations lose the rounding alone, and up to 1.16 of it in sums of one sign on Hopper (docs/numerics.md).
MOST_OVER_ROUNDING = 1.25


@dataclass(frozen=True)
class Loss:
    """A line of the output and an object of --json: the error of each way."""

    op: str
    device: str
    activations: str  # what is multiplied
    exact: float
    fp8: float
    torch_bmm: float
    rounding: float

    @property
    def passed(self) -> bool:
        return self.exact <= MOST_OVER_ROUNDING * self.rounding  # false for NaN


def losses(weights: AbsorbedWeights, device: str, seed: int) -> Iterator[Loss]:
    """Both ops on every kind of activations, made from the seed."""
    w_uk, w_uk_scale, w_uv, w_uv_scale = weights.to(device).buffers()
    for op, w, w_scale in ((absorb_q, w_uk, w_uk_scale), (v_up, w_uv, w_uv_scale)):
        exact = dequantize_blocks(w, w_scale)
        rounded = exact.bfloat16()
        random = torch.Generator("cpu").manual_seed(seed)
        values = torch.randn(TOKENS, w.shape[0], w.shape[2], generator=random, device="cpu", dtype=torch.float32)
        for kind, make in KINDS.items():
            x = make(values).to(device, torch.bfloat16)
            want = torch.einsum("shk,hnk->shn", x.double(), exact)
            found = {
                "exact": op(x, w, w_scale),
                "fp8": op(x, w, w_scale, activations="fp8"),
                "torch_bmm": torch.bmm(x.transpose(0, 1), rounded.mT).transpose(0, 1),
                "rounding": want.bfloat16(),
            }
            norm = want.norm()
            errors = {name: float((got.double() - want).norm() / norm) for name, got in found.items()}
            yield Loss(op.__name__, device, kind, **errors)


def show(found: Sequence[Loss], terminal: Terminal) -> None:
    for device, of_device in itertools.groupby(found, lambda loss: loss.device):
        kept = list(of_device)
        rows: list[tuple[str, ...]] = [(device, "activations", "exact", "fp8", "torch.bmm", "rounding")]
        for loss in kept:
            errors = (loss.exact, loss.fp8, loss.torch_bmm, loss.rounding)
            rows.append((loss.op, loss.activations, *(f"{error:.2e}" for error in errors)))
        lines = table(rows, align="<<>>>>", width=terminal.width, flexible=1)
        for style, row in zip(["bold", *("" if loss.passed else "bold red" for loss in kept)], lines, strict=True):
            terminal.print_lines(row, style)
    if found:
        terminal.print_lines(["", *wrap(LEGEND, terminal.width)], "dim")
    if failed := [f"{loss.op}, {loss.activations}, on {loss.device}" for loss in found if not loss.passed]:
        bound = f"exact is over {MOST_OVER_ROUNDING} times rounding"
        terminal.print_lines(["", *wrap(f"FAIL: {bound}: {'; '.join(failed)}", terminal.width)], "bold red")
