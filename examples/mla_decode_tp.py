"""torchrun --standalone --nproc-per-node=2 examples/mla_decode_tp.py: MLA decode, heads shared among ranks, on a GPU
each or on the CPU, beside the whole layer on each. q_b is cut by columns and o_proj by rows: one all-reduce a step."""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from mla_decode import BF16_NOISE, decode_step, now_us, read_layer, write_checkpoint
from transformers.models import deepseek_v3

from mla_fp8 import AbsorbedWeights


def decode(directory: Path, batch: int, steps: int, device: torch.device) -> bool:
    """Whether the ranks' parts add up to the whole layer's result but for bf16: each is rounded, and each addition."""
    rank, size, config = dist.get_rank(), dist.get_world_size(), deepseek_v3.DeepseekV3Config.from_pretrained(directory)
    whole, part = (read_layer(directory, 0, config)[0].to(device, torch.bfloat16) for _ in range(2))
    rotary = deepseek_v3.modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config)
    for linear, dim in ((part.q_b_proj, 0), (part.o_proj, 1)):
        linear.weight = torch.nn.Parameter(linear.weight.chunk(size, dim)[rank].contiguous())
    weights = [AbsorbedWeights.from_safetensors(directory, 0, *heads).to(device) for heads in ((0, 1), (rank, size))]
    caches = [torch.zeros(batch, steps, 576, dtype=torch.bfloat16, device=device) for _ in weights]
    times_us, errors, bound = [], [], 2 * BF16_NOISE * (size + 1) ** 0.5
    for position in range(steps):
        x = torch.randn(batch, config.hidden_size).to(device, torch.bfloat16)
        rope = [t[:, 0].to(device, torch.bfloat16) for t in rotary(torch.ones(1), torch.full((batch, 1), position))]
        want, _ = decode_step(whole, weights[0], x, rope, caches[0], position)
        start = now_us(device)
        got, _ = decode_step(part, weights[1], x, rope, caches[1], position)
        dist.all_reduce(got)
        times_us.append(now_us(device) - start)
        errors.append(float((got.float() - want.float()).norm() / want.float().norm()))
    step = f"{weights[1].num_heads} heads, {sorted(times_us)[steps // 2]:.1f} µs a step, error {max(errors):.1e}"
    print(f"rank {rank} of {size} on {device}: {step}, bound {bound:.1e}", flush=True)
    dist.destroy_process_group()
    return all(error <= bound for error in errors)  # false for NaN


@torch.inference_mode()
def main() -> int:
    parser, cuda = argparse.ArgumentParser(description=__doc__), torch.cuda.is_available()
    for name, default in (("--heads", 16), ("--hidden", 1024), ("--batch", 4), ("--steps", 16)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as built:
        if dist.get_rank() == 0:
            write_checkpoint(Path(built), options.heads, options.hidden)
        dist.broadcast_object_list(directory := [built])  # of rank 0, once it is written
        torch.manual_seed(0)
        return 0 if decode(Path(directory[0]), options.batch, options.steps, device) else 1


if __name__ == "__main__":
    raise SystemExit(main())
