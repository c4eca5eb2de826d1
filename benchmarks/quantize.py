"""quantize_q_nope on a GPU against copies that move the same bytes.

    python benchmarks/quantize.py [--s 1024 --s 4096] [--heads 128] [--json FILE]

Each contender is one CUDA graph of back-to-back calls over buffers that together exceed L2 several times; the graphs
are replayed in turn. A copy reads half of the op's bytes and writes the other half: `memcpy` is the driver's copy,
`elementwise` is torch's bitwise_not. The stream ceiling is the faster of the two.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import mla_fp8  # noqa: F401  loads the ops
from mla_fp8 import reference

GROUP = 128
ROPE_DIM = 64  # q_nope is usually a view of q[S, H, 128 + 64]
L2_MULTIPLE = 4  # of what the buffers of one graph hold together
CALLS_A_GRAPH = 32  # at least: a replay must be long against its own launch
SAMPLES = 60


@dataclass
class Row:
    s: int
    heads: int
    input: str
    bytes_moved: int
    us: float
    us_p20: float
    us_p80: float
    gbps: float
    memcpy_us: float
    elementwise_us: float
    percent_of_stream: float
    gpu: str
    driver: str
    torch: str
    commit: str


def output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def graph_of(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    for call in calls:  # loads kernels before the capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def interleaved_us(graphs: list[tuple[torch.cuda.CUDAGraph, int]]) -> list[list[float]]:
    """µs a call: one list of samples a graph, which holds the given number of calls."""
    samples: list[list[float]] = [[] for _ in graphs]
    for i in range(SAMPLES + 3):
        for (graph, calls), times in zip(graphs, samples, strict=True):
            begin, end = event(), event()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 3:
                times.append(begin.elapsed_time(end) * 1e3 / calls)
    return samples


def check(q_nope: Tensor, val: Tensor, scale: Tensor) -> None:
    want_val, want_scale = reference.quantize_q_nope(q_nope)
    if not (torch.equal(val.view(torch.uint8), want_val.view(torch.uint8)) and torch.equal(scale, want_scale)):
        sys.exit(f"quantize_q_nope differs from the reference for {tuple(q_nope.shape)} {q_nope.stride()}")


def measure(s: int, heads: int, is_view: bool, machine: dict[str, str]) -> Row:
    m = math.ceil(s / 256) * 256
    read, written = s * heads * GROUP * 2, heads * m * (GROUP + 4)
    half = (read + written) // 2 // 16 * 16
    sets = max(2, math.ceil(L2_MULTIPLE * torch.cuda.get_device_properties(0).L2_cache_size / (read + written)))
    width = GROUP + ROPE_DIM if is_view else GROUP
    inputs = [torch.randn(s, heads, width, device="cuda").bfloat16()[..., :GROUP] for _ in range(sets)]
    outputs = [torch.ops.mla_fp8.quantize_q_nope(q_nope) for q_nope in inputs]
    copies = [torch.randint(0, 255, (2, half), dtype=torch.uint8, device="cuda").view(torch.int32) for _ in range(sets)]

    op = torch.ops.mla_fp8.quantize_q_nope.out
    calls = sets * math.ceil(CALLS_A_GRAPH / sets)
    contenders: list[list[Callable[[], object]]] = [
        [partial(op, inputs[i], val_out=outputs[i][0], scale_out=outputs[i][1]) for i in range(sets)],
        [partial(pair[1].copy_, pair[0]) for pair in copies],
        [partial(torch.bitwise_not, pair[0], out=pair[1]) for pair in copies],
    ]
    graphs = [(graph_of(contender * (calls // sets)), calls) for contender in contenders]
    for val, scale in outputs:
        val.view(torch.uint8).fill_(255)
        scale.fill_(float("nan"))
    graphs[0][0].replay()
    for q_nope, (val, scale) in zip(inputs, outputs, strict=True):
        check(q_nope, val, scale)

    own, memcpy, elementwise = interleaved_us(graphs)
    us, memcpy_us, elementwise_us = (statistics.median(times) for times in (own, memcpy, elementwise))
    p20, *_, p80 = statistics.quantiles(own, n=5)
    return Row(
        s=s,
        heads=heads,
        input=f"view of [S,H,{width}]" if is_view else "contiguous",
        bytes_moved=read + written,
        us=us,
        us_p20=p20,
        us_p80=p80,
        gbps=(read + written) / us / 1e3,
        memcpy_us=memcpy_us,
        elementwise_us=elementwise_us,
        percent_of_stream=100 * min(memcpy_us, elementwise_us) / us,
        **machine,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--s", type=int, action="append", help="tokens; may be repeated")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--json", type=Path, help="also write one JSON object a row")
    arguments = parser.parse_args()
    machine = {
        "gpu": torch.cuda.get_device_name(0),
        "driver": output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]),
        "torch": torch.__version__,
        "commit": output(["git", "rev-parse", "--short", "HEAD"]),
    }
    print("quantize_q_nope, " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    print(
        f"{'S':>6} {'H':>4} {'input':<19} {'µs':>7} {'p20':>7} {'p80':>7} {'GB/s':>6} {'% stream':>8} "
        f"{'memcpy µs':>9} {'ratio':>5} {'elementwise µs':>14} {'ratio':>5}"
    )
    rows = []
    for s in arguments.s or [1, 16, 128, 1024, 4096]:
        for is_view in (False, True):
            row = measure(s, arguments.heads, is_view, machine)
            rows.append(row)
            print(
                f"{row.s:>6} {row.heads:>4} {row.input:<19} {row.us:>7.2f} {row.us_p20:>7.2f} {row.us_p80:>7.2f} "
                f"{row.gbps:>6.0f} {row.percent_of_stream:>8.1f} {row.memcpy_us:>9.2f} {row.us / row.memcpy_us:>5.2f} "
                f"{row.elementwise_us:>14.2f} {row.us / row.elementwise_us:>5.2f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


if __name__ == "__main__":
    main()
