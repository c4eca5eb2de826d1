"""How far each way to multiply is from exact arithmetic on the same FP8 weights, for kinds of data.

    python -m benchmarks.quality.rounding --json benchmarks/results/rounding.json     on any machine, in minutes
    python -m benchmarks.quality.rounding --outputs 8192                              in seconds

Both activations are summed by the bit model of Hopper's tensor cores, which GPUs are tested
against; torch.bmm is fp32 sums of exact products with weights dequantized to the activations'
dtype, whose order the CPU chooses. docs/numerics.md shows what comes of it.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mla_fp8 import reference
from mla_fp8.formats import E4M3, EXACT_TERMS, FP8_MAX, GROUP

from ..bench.report import Rows, command_of, cpu_environment, markdown, note, parser_of, progress, write_whole

OUTPUTS = 131_072  # of each case: a small sample scatters
HEADS, N = 4, 512
WIDTHS = (128, 512)  # K of absorb_q and of v_up
DTYPES = (torch.bfloat16, torch.float16)
WEIGHT_SPREAD = 100.0  # of the codes: a block's largest is then about 448
COLUMN = 5  # that is the outlier
DEGREES_OF_FREEDOM = 3  # of Student's t: the fourth moment is infinite


def _column(factor: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x[..., COLUMN] *= factor
        return x

    return change


def _heavy(x: Tensor) -> Tensor:
    squares = torch.randn(DEGREES_OF_FREEDOM, *x.shape, dtype=x.dtype).square().mean(0)
    return x / squares.sqrt()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "one column 30x": _column(30),
    "one column 1000x": _column(1000),
    "heavy tails": _heavy,
    "cubed": lambda x: x**3,
    "rows of 1e-2 to 1e2": lambda x: x * 10 ** (4 * torch.rand(*x.shape[:-1], 1, dtype=x.dtype) - 2),
    "positive": torch.abs,
    "positive, weights too": torch.abs,
}


@dataclass(frozen=True)
class Row:
    """Errors relative to the norm of the exact result; all but sums are of results rounded to dtype."""

    kind: str
    dtype: str
    k: int
    outputs: int
    exact: float
    fp8: float
    bmm: float
    rounding: float  # of the exact result, once
    sums: float  # of exact, before its rounding
    bias: float  # of the same: sum(sign(want) (got - want)) / sum |want|
    fewer_terms: float  # exact with a term less than it takes


def weights(positive: bool, k: int) -> tuple[Tensor, Tensor]:
    values = torch.randn(HEADS, N, k) * WEIGHT_SPREAD
    values = values.abs() if positive else values
    scale = (torch.rand(HEADS, N // GROUP, k // GROUP) + 0.5) * 1e-3
    return values.clamp(-FP8_MAX, FP8_MAX).to(E4M3), scale


def tensor_core_terms(x: Tensor, terms: int, w: Tensor, w_scale: Tensor) -> Tensor:
    """tensor_core_product of what that many terms hold of x."""
    values, scale = reference.split(x, terms)
    kept = (values.float().sum(0) * scale.repeat_interleave(GROUP, -1)).to(x.dtype)
    return reference.tensor_core_product(kept, None, w, w_scale)


def measure(kind: str, dtype: torch.dtype, k: int, outputs: int) -> Row:
    tokens = -(-outputs // (HEADS * N))
    w, w_scale = weights("weights" in kind, k)
    x = KINDS[kind](torch.randn(tokens, HEADS, k, dtype=torch.float64)).to(dtype)
    want = reference.exact_product(x, None, w, w_scale)

    def error(got: Tensor) -> float:
        return float((got.double() - want).norm() / want.norm())

    sums = reference.tensor_core_product(x, None, w, w_scale)
    dense = reference.dequantize_blocks(w, w_scale).to(dtype).float()
    return Row(
        kind,
        str(dtype).removeprefix("torch."),
        k,
        want.numel(),
        exact=error(sums.to(dtype)),
        fp8=error(reference.tensor_core_product(*reference.quantize(x), w, w_scale).to(dtype)),
        bmm=error(torch.einsum("shk,hnk->shn", x.float(), dense).to(dtype)),
        rounding=error(want.to(dtype)),
        sums=error(sums),
        bias=float((want.sign() * (sums.double() - want)).sum() / want.abs().sum()),
        fewer_terms=error(tensor_core_terms(x, EXACT_TERMS[dtype] - 1, w, w_scale).to(dtype)),
    )


COLUMNS = {
    "exact": "exact",
    "rounding": "rounding alone",
    "bmm": "torch.bmm",
    "fewer_terms": "a term fewer",
    "fp8": "fp8",
    "sums": "exact, not rounded",
}


def cells(row: Mapping[str, Any]) -> list[str]:
    ratios = [row["exact"] / row["rounding"], row["exact"] / row["bmm"]]
    thousandths = [row[name] * 1e3 for name in COLUMNS]
    return [
        *(f"{error:.2f}" if error >= 1 else f"{error:.3f}" for error in thousandths),
        f"{row['bias'] * 1e4:+.2f}",
        *(f"{ratio:.2f}" for ratio in ratios),
    ]


def table(rows: Rows) -> str:
    """Of docs/numerics.md: bf16 whole, then fp16."""
    parts, header = [], [*COLUMNS.values(), "its bias, 1e-4", "exact / rounding", "exact / torch.bmm"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        lines = [[f"{row['kind']}, K = {row['k']}", *cells(row)] for row in rows if row["dtype"] == dtype]
        parts.append(markdown([dtype, *header], lines))
    told = f"Relative errors in 1e-3, of {rows[0]['outputs']:,} outputs each"
    return "\n".join(parts) + note(told, rows[0], "command", "torch", "commit", "date")


def parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, commit=False)
    parser.add_argument("--outputs", type=int, default=OUTPUTS, help="of a case, at least; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def main() -> int:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows = []
    cases = [(dtype, k, kind) for dtype in DTYPES for kind in KINDS for k in WIDTHS]
    where = {**cpu_environment(args.threads), "command": command_of(sys.argv), "seed": args.seed}
    with progress(Console(stderr=True)) as bar:
        for dtype, k, kind in bar.track(cases, description="products"):
            rows.append(asdict(measure(kind, dtype, k, args.outputs)))
    print(table([{**where, **row} for row in rows]))
    if args.json:
        write_whole(args.json, rows, where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
