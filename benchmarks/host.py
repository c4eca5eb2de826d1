"""Host µs a call: dispatch, checks, configuration and launch, as a Python caller pays them.

Calls run in batches short enough for the device's queue to hold, without synchronization inside; contenders take turns.
"""

import argparse
import gc
import time
from collections.abc import Callable

import timing
import torch
from buffers import Buffers
from measure import text_of
from report import microseconds
from rich.console import Console
from rich.table import Table
from sides import SIDES

import mla_fp8

CALLS_A_BATCH = 200
DEFAULT_S = [1, 16]


def candidates(s: int, heads: int) -> dict[str, Callable[[], object]]:
    front, back = (Buffers(SIDES[name], s, heads, {}, seed=0) for name in ("front576", "back_fp8"))
    latent = torch.empty(s, heads, front.side.n, dtype=torch.bfloat16, device="cuda")
    out_scale = front.out_scale
    op, q, a, weight = torch.ops.mla_fp8, front.x_full, front.x.transpose(0, 1), front.w_bf16_t
    absorb, pe, up = (front.x, front.w, front.w_scale), front.pe, (back.x, back.w, back.w_scale)
    return {
        "absorb_q.default(q_nope, w, scale)": lambda: op.absorb_q.default(*absorb),
        "absorb_q.default(q_nope, w, scale, q_pe)": lambda: op.absorb_q.default(*absorb, pe),
        "absorb_q.default(q_nope, w, scale, q_pe, out_scale)": lambda: op.absorb_q.default(*absorb, pe, out_scale),
        "absorb_q.out(q_nope, w, scale, q_out=)": lambda: op.absorb_q.out(*absorb, q_out=latent),
        "mla_fp8.absorb_q(q_nope, w, scale)": lambda: mla_fp8.absorb_q(*absorb),
        "v_up.default(o_latent, w, scale)": lambda: op.v_up.default(*up),
        "v_up_quantized.default(o_latent, w, scale)": lambda: op.v_up_quantized.default(*up),
        "quantize_q_nope.default(q_nope)": lambda: op.quantize_q_nope.default(absorb[0]),
        "q + q": lambda: q + q,
        "torch.ops.aten.add.Tensor(q, q)": lambda: torch.ops.aten.add.Tensor(q, q),  # the same by the path of our ops
        "torch.bmm(q_nope, w)": lambda: torch.bmm(a, weight),
        "torch.empty_like(q)": lambda: torch.empty_like(q),
    }


def host_us(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS_A_BATCH):
        call()
    return (time.perf_counter() - begin) * 1e6 / CALLS_A_BATCH


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, timing.Timing], dict[str, str]]:
    failed = {}
    for name, call in list(calls.items()):
        try:
            host_us(call)
        except Exception as error:
            failed[name] = text_of(error)
            del calls[name]
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name].append(host_us(call))
    finally:
        gc.enable()
    return {name: timing.Timing.of(times) for name, times in samples.items()}, failed


def run(options: argparse.Namespace, console: Console) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for heads in options.heads:
        for s in options.s or DEFAULT_S:
            timings, failed = measure(candidates(s, heads), options.replays)
            table = Table(title=f"host, S = {s}, H = {heads}", title_justify="left")
            for column in ("call", "µs", "p20", "p80", "over q + q"):
                table.add_column(column, justify="left" if column == "call" else "right")
            for name, result in sorted(timings.items(), key=lambda item: item[1].us):
                ratio = result.us / timings["q + q"].us
                table.add_row(name, *map(microseconds, (result.us, result.p20, result.p80)), f"{ratio:.2f}x")
                row = {"mode": "host", "s": s, "heads": heads, "contender": name, "us": result.us}
                rows.append({**row, "us_p20": result.p20, "us_p80": result.p80, "over_q_plus_q": ratio})
            for name, reason in failed.items():
                table.add_row(f"{name}: failed: {reason}")
                rows.append({"mode": "host", "s": s, "heads": heads, "contender": name, "failed": reason})
            console.print(table)
    return rows
