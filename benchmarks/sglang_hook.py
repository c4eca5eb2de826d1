"""What SGLang's hook runs (mla_fp8.integrations.sglang) beside a stand-in for what it replaces, on a GPU.

    python benchmarks/sglang_hook.py [--s 1,16,128,1024] [--heads 128] [--k 128,512] [--json FILE]

The stand-in allocates the same results and launches one Triton kernel that does as SGLang's: a program a row, its
groups in turn, by division (triton_kernels.row_quant_kernel; no line is SGLang's). Method as in gpu.py, allocations
included; `host` is the time of a call on the host. Values must agree within one FP8 step, scales within 2 ulp. Status
1: they do not; 4: the hook is the slower one somewhere on the device.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timing
import torch
from gpu import integers
from report import environment, microseconds, origin, write_json
from rich.console import Console
from rich.table import Table
from sides import rotation
from torch import Tensor

from mla_fp8.formats import E4M3, GROUP
from mla_fp8.integrations.sglang import M_ALIGNMENT, Quantized, around

EPS = 1e-12  # SGLang's default
HOST_CALLS = 200
HOOK, STAND_IN = "mla_fp8", "stand-in"


def stand_in(x: Tensor, group_size: int = GROUP, eps: float = EPS, dtype: torch.dtype = E4M3) -> Quantized:
    from triton_kernels import row_quant_kernel

    heads, rows, k = x.shape
    m, groups = -(-rows // M_ALIGNMENT) * M_ALIGNMENT, k // group_size
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


def host_us(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    us = (time.perf_counter() - began) / HOST_CALLS * 1e6
    torch.cuda.synchronize()
    return us


def measure(s: int, heads: int, k: int) -> dict[str, object]:
    moved = heads * s * (2 * k + k + k // GROUP * 4)
    sets = range(rotation(moved, torch.cuda.get_device_properties(0).L2_cache_size))
    inputs = [torch.randn(s, heads, k, device="cuda").bfloat16().transpose(0, 1) for _ in sets]
    hook = partial(around, stand_in)
    check(hook(inputs[0]), stand_in(inputs[0]))
    launches = timing.launches_for(moved, len(sets))
    graphs = {
        name: timing.capture([partial(one, x) for x in inputs], launches)
        for name, one in ((HOOK, hook), (STAND_IN, stand_in))
    }
    samples = timing.interleave(graphs, timing.REPLAYS)
    own, other = (timing.Timing.of(samples[name]).us for name in (HOOK, STAND_IN))
    host = {name: host_us(partial(one, inputs[0])) for name, one in ((HOOK, hook), (STAND_IN, stand_in))}
    row: dict[str, object] = {"mode": "sglang_hook", "s": s, "heads": heads, "k": k, "us": own, "stand_in_us": other}
    return row | {"host_us": host[HOOK], "stand_in_host_us": host[STAND_IN]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--s", type=integers, default=[1, 16, 128, 1024], help="tokens")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--k", type=integers, default=[128, 512])
    parser.add_argument("--json", type=Path, help="write one JSON object a row")
    parser.add_argument("--commit", help="for the JSON rows, where git cannot tell")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    if not torch.cuda.is_available():
        console.print("benchmarks/sglang_hook.py: needs a CUDA device")
        return 2
    facts = environment(options.commit)
    try:
        rows = [measure(s, options.heads, k) for k in options.k for s in options.s]
    except ValueError as error:
        console.print(f"wrong result: {error}", style="bold red", markup=False)
        return 1
    table = Table("K", "S", "H", "µs, mla_fp8", "stand-in", "host µs, mla_fp8", "stand-in")
    for row in rows:
        times = (float(str(row[name])) for name in ("us", "stand_in_us", "host_us", "stand_in_host_us"))
        table.add_row(*(str(row[name]) for name in ("k", "s", "heads")), *map(microseconds, times))
    console.print(table)
    console.print(origin(facts))
    if options.json:
        write_json(options.json, rows, facts)
    return 4 if any(float(str(row["us"])) > float(str(row["stand_in_us"])) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
