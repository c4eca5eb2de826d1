"""A decode step of one MLA layer with its heads shared among ranks: µs a step, beside how far it is
from one rank's.

    python -m benchmarks.layers.tensor_parallel [--ranks 1,2,4] [--batch 1,64] [--context 1024] [--json FILE]

    q_b (its columns) -> absorb_q -> attention over latents -> v_up -> o_proj (its rows) -> one all-reduce

Starts torchrun for each number of ranks; without --ranks for each power of 2 up to the number of
GPUs. Every rank makes the whole layer from a seed, runs all heads once for the result to compare
with, and keeps its own. On GPUs a step is in a CUDA graph, the all-reduce too, replayed back to
back; the time is the slowest rank's median. Without GPUs ranks meet over gloo and the step runs
eagerly: that shows that it works, not how fast it is. Status 1: a run failed, or a result is off by
more than BOUND.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mla_fp8 import AbsorbedWeights, absorb_q, v_up
from mla_fp8.attention import attend_latents
from mla_fp8.attention.backends import LATENT, ROPE, WIDTH

from ..bench import timing
from ..bench.measure import relative_error
from ..bench.report import console_of, environment, finish, grid, integers, microseconds, parser_of
from .decode_case import HEAD_DIM, SCALE

Q_RANK = 1536  # DeepSeek-V3's q_lora_rank
NOPE = V_DIM = HEAD_DIM
STEPS_A_GRAPH, STEPS_ON_CPU = 20, 5
# Each rank's part is rounded to bf16 (1.7e-3 of the norm), so is every addition, and the whole;
# twice that for 8 ranks.
BOUND = 1e-2


class Layer:
    """Some heads of the layer, and a decode step over their shared cache."""

    def __init__(self, q_b: Tensor, kv_b: Tensor, o: Tensor, cache: Tensor) -> None:
        self.q_b, self.o, self.cache = q_b, o, cache
        self.heads = kv_b.shape[0] // (NOPE + V_DIM)
        self.weights = AbsorbedWeights.from_bf16(kv_b, self.heads)

    def step(self, x: Tensor) -> Tensor:
        """x [S, Q_RANK] -> [S, hidden], the part of these heads."""
        w_uk, w_uk_scale, w_uv, w_uv_scale = self.weights.buffers()
        q_nope, q_pe = (x @ self.q_b.T).view(x.shape[0], self.heads, NOPE + ROPE).split([NOPE, ROPE], dim=-1)
        q = absorb_q(q_nope, w_uk, w_uk_scale, q_pe).unsqueeze(1)
        o_latent = attend_latents(q, *self.cache.split([LATENT, ROPE], dim=-1), scale=SCALE, backend="torch")
        return v_up(o_latent[:, 0], w_uv, w_uv_scale).flatten(1) @ self.o.T


def make(batch: int, context: int, heads: int, hidden: int, device: torch.device) -> tuple[Tensor, Layer, Layer]:
    """x, the whole layer, and this rank's heads of it; the same numbers on every rank."""
    random = torch.Generator(device=device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=random, device=device, dtype=torch.float32)
        return (values / shape[-1] ** 0.5).bfloat16()

    q_b, kv_b = randn(heads * (NOPE + ROPE), Q_RANK), randn(heads * (NOPE + V_DIM), LATENT)
    o, x = randn(hidden, heads * V_DIM), randn(batch, Q_RANK) * Q_RANK**0.5
    cache = randn(batch, context, WIDTH) * WIDTH**0.5
    rank, size = dist.get_rank(), dist.get_world_size()
    own_q_b, own_kv_b, own_o = (w.chunk(size, dim)[rank].contiguous() for w, dim in ((q_b, 0), (kv_b, 0), (o, 1)))
    return x, Layer(q_b, kv_b, o, cache), Layer(own_q_b, own_kv_b, own_o, cache)


def replayed_us(step: Callable[[], object]) -> list[float]:
    """µs a step of every replay of a graph of steps."""
    captured = timing.capture([step], STEPS_A_GRAPH, error_mode="thread_local")  # NCCL watches from another thread
    return timing.interleave({"step": captured}, timing.REPLAYS)["step"]


def measure(batch: int, context: int, heads: int, hidden: int, device: torch.device) -> dict[str, object]:
    x, whole, own = make(batch, context, heads, hidden, device)
    want, out = whole.step(x), torch.empty(batch, hidden, dtype=torch.bfloat16, device=device)
    del whole

    def step() -> None:
        out.copy_(own.step(x))
        dist.all_reduce(out)

    step()
    error = torch.tensor(relative_error(out, want), device=device)
    if device.type == "cuda":
        samples = replayed_us(step)
    else:
        samples = [timing.called_us(step, 1, device) for _ in range(STEPS_ON_CPU)]
    us = torch.tensor(statistics.median(samples), device=device)
    for most in (error, us):
        dist.all_reduce(most, dist.ReduceOp.MAX)
    shape = {"batch": batch, "context": context, "heads": heads, "hidden": hidden}
    return {"mode": "tensor_parallel", "ranks": dist.get_world_size(), **shape, "us": float(us), "error": float(error)}


def parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=integers, help="how many, one run each")
    parser.add_argument("--batch", type=integers, default=[1, 64], help="sequences (default 1,64)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=7168)
    return parser


def arguments() -> argparse.Namespace:
    options = parser().parse_args()
    gpus = torch.cuda.device_count()
    options.ranks = options.ranks or [1 << power for power in range(max(1, gpus).bit_length())]
    for ranks in options.ranks:
        if ranks < 1 or options.heads % ranks or (gpus and ranks > gpus):
            rule = f"divide {options.heads} heads" + f" and be at most {gpus}, the number of GPUs" * bool(gpus)
            parser().error(f"--ranks must {rule}, got {ranks}")
    return options


@torch.no_grad()
def run_rank(options: argparse.Namespace) -> None:
    """One process of torchrun: rank 0 writes the rows."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rows = [measure(batch, options.context, options.heads, options.hidden, device) for batch in options.batch]
    if dist.get_rank() == 0:
        options.json.write_text(json.dumps(rows))
    dist.destroy_process_group()


def rows_of(ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What so many ranks measured; nothing where they failed, which torchrun tells."""
    shape = {"ranks": ranks, "batch": ",".join(map(str, options.batch)), "context": options.context}
    shape |= {"heads": options.heads, "hidden": options.hidden}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.json"
        words = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        module = ["--module", f"{__package__}.tensor_parallel"]
        command = [*torchrun, f"--nproc-per-node={ranks}", *module, *words, "--json", str(file)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
        return json.loads(file.read_text()) if file.exists() else []


def main() -> int:
    options = arguments()
    if "RANK" in os.environ:
        run_rank(options)
        return 0
    facts, rows, failed = environment(options.commit), [], False
    table = grid(None, "ranks", "batch", "context", "H", "hidden", "µs a step", "error", left=0)
    for ranks in options.ranks:
        measured = rows_of(ranks, options)
        failed |= not measured or not all(row["error"] < BOUND for row in measured)
        for row in measured:
            cells = (str(row[name]) for name in ("ranks", "batch", "context", "heads", "hidden"))
            table.add_row(*cells, microseconds(row["us"]), f"{row['error']:.1e}")
        rows += measured
    console = console_of()
    console.print(table)
    finish(console, options, rows, facts)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
