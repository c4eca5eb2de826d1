"""What SGLang's hook runs (mla_fp8.integrations.sglang) beside a stand-in for what it replaces, on
a GPU.

    python -m benchmarks.layers.sglang_hook [--s 1,16,128,1024] [--heads 128] [--k 128,512] [--json FILE]

The stand-in allocates the same results and launches one Triton kernel that does as SGLang's: a
program a row, its groups in turn, by division (row_quant_kernel of bench/triton_kernels.py; no line
is SGLang's). Method as in gpu.py, allocations included; `host` is the time of a call on the host.
Values must agree within one FP8 step, scales within 2 ulp. Status 1: they do not; 4: the hook is
the slower one somewhere on the device.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mla_fp8.formats import E4M3, GROUP
from mla_fp8.integrations.sglang import M_ALIGNMENT, Quantized, around

from ..bench import timing
from ..bench.measure import l2_bytes
from ..bench.report import console_of, environment, finish, grid, integers, microseconds, needs_gpu, parser_of
from ..bench.sides import rotation, round_up

EPS = 1e-12  # SGLang's default
HOOK, STAND_IN = "mla_fp8", "stand-in"


def stand_in(x: Tensor, group_size: int = GROUP, eps: float = EPS, dtype: torch.dtype = E4M3) -> Quantized:
    from ..bench.triton_kernels import row_quant_kernel

    heads, rows, k = x.shape
    m, groups = round_up(rows, M_ALIGNMENT), k // group_size
    val = torch.empty((heads, m, k), dtype=dtype, device=x.device)
    scale = torch.empty((heads, groups, m), dtype=torch.float32, device=x.device).transpose(1, 2)
    counts = torch.empty((heads,), dtype=torch.int32, device=x.device)
    row_quant_kernel[(rows, heads)](
        *(x, *x.stride()[:2], val, *val.stride()[:2], scale, *scale.stride(), counts, eps), GROUPS=groups, num_warps=1
    )
    return val, scale, counts, rows, m


def check(got: Quantized, want: Quantized) -> None:
    """Raises ValueError where the results differ by more than the contract allows."""
    rows = want[3]
    if got[3:] != want[3:] or not torch.equal(got[2], want[2]):
        raise ValueError(f"masked_m, S and M must be {want[2].tolist()[:1]}, {want[3:]}, got {got[3:]}")
    val, want_val = (one[0][:, :rows].view(torch.uint8).int() for one in (got, want))
    scale, want_scale = (one[1][:, :rows].contiguous().view(torch.int32) for one in (got, want))
    codes, ulps = int((val - want_val).abs().max()), int((scale - want_scale).abs().max())
    if codes > 1 or ulps > 2:
        raise ValueError(f"values must be within 1 code and scales within 2 ulp, got {codes} and {ulps}")


def measure(s: int, heads: int, k: int) -> dict[str, float | str]:
    moved = heads * s * (2 * k + k + k // GROUP * 4)
    sets = range(rotation(moved, l2_bytes()))
    inputs = [torch.randn(s, heads, k, device="cuda").bfloat16().transpose(0, 1) for _ in sets]
    ways: dict[str, Callable[[Tensor], Quantized]] = {HOOK: partial(around, stand_in), STAND_IN: stand_in}
    check(ways[HOOK](inputs[0]), stand_in(inputs[0]))
    launches = timing.launches_for(moved, len(sets))
    graphs = {name: timing.capture([partial(one, x) for x in inputs], launches) for name, one in ways.items()}
    samples = timing.interleave(graphs, timing.REPLAYS)
    own, other = (timing.Timing.of(samples[name]).us for name in ways)
    host, other_host = (
        timing.called_us(partial(one, inputs[0]), timing.HOST_CALLS, torch.device("cuda")) for one in ways.values()
    )
    times = {"us": own, "stand_in_us": other, "host_us": host, "stand_in_host_us": other_host}
    return {"mode": "sglang_hook", "s": s, "heads": heads, "k": k, **times}


def parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--s", type=integers, default=[1, 16, 128, 1024], help="tokens")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--k", type=integers, default=[128, 512])
    return parser


def main() -> int:
    options, console = parser().parse_args(), console_of()
    if needs_gpu(console):
        return 2
    facts = environment(options.commit)
    try:
        rows = [measure(s, options.heads, k) for k in options.k for s in options.s]
    except ValueError as error:
        console.print(f"wrong result: {error}", style="bold red", markup=False)
        return 1
    table = grid(None, "K", "S", "H", "µs, mla_fp8", "stand-in", "host µs, mla_fp8", "stand-in", left=0)
    for row in rows:
        times = (float(row[name]) for name in ("us", "stand_in_us", "host_us", "stand_in_host_us"))
        table.add_row(*(str(row[name]) for name in ("k", "s", "heads")), *map(microseconds, times))
    console.print(table)
    finish(console, options, rows, facts)
    return 4 if any(float(row["us"]) > float(row["stand_in_us"]) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
