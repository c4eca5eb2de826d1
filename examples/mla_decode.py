"""Decode with DeepSeek-V3's MLA through FP8 absorbed weights, next to transformers' own layer.

Builds an attention layer at DeepSeek-V3's head dims with random weights, writes it as an FP8 checkpoint in DeepSeek's
format, loads it back and decodes a batch token by token. With --checkpoint: takes a layer of real shards instead.

    x -> q_a, q_b, kv_a, RoPE -> absorb_q -> attention over latents [tokens, 576] -> v_up -> o_proj
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from mla_fp8 import AbsorbedWeights, absorb_q, v_up
from mla_fp8.attention import attend_latents, backends
from mla_fp8.formats import FP8_MAX, GROUP
from mla_fp8.weights.checkpoint import INDEX_FILE, tensor_files
from mla_fp8.weights.kv_b_proj import decode_scale

BF16_NOISE = 1.7e-3  # what rounding to bf16, 8 significant bits, adds to a tensor in the mean square
ERROR_MARGIN = math.sqrt(2)  # over the estimate in `error_bound`
STAGES = ("q, kv", "absorb_q", "attention", "v_up", "o_proj")
DEEPSEEK_V3 = {  # the published config.json, as far as attention reads it
    "model_type": "deepseek_v3", "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "qk_rope_head_dim": 64, "max_position_embeddings": 163840, "rope_theta": 10000, "initializer_range": 0.02,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
                     "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [GROUP, GROUP]},
}  # fmt: skip


def error_bound(spread: float) -> float:
    """What bf16 costs, in independent roundings: 8 of values (kv_a and o: weights and results; norm, softmax, o_latent,
    v); 9 of q and of keys, which move a logit, and so a softmax weight, by the logits' spread (standard deviation)."""
    return ERROR_MARGIN * BF16_NOISE * math.sqrt(8 + 9 * spread**2)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> e4m3 [N, K] and one fp32 scale a 128x128 block; blocks at the edge may be smaller."""
    padded = F.pad(weight, (0, -weight.shape[1] % GROUP, 0, -weight.shape[0] % GROUP))
    scale = reduce(padded.abs(), "(n a) (k b) -> n k", "max", a=GROUP, b=GROUP) / FP8_MAX
    scaled = padded / repeat(scale, "n k -> (n a) (k b)", a=GROUP, b=GROUP)
    return scaled[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn).contiguous(), scale


def write_checkpoint(directory: Path, heads: int, hidden: int) -> None:
    """One random layer: config.json, two shards and their index, FP8 with `weight_scale_inv` as published."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads, "hidden_size": hidden}
    (directory / "config.json").write_text(json.dumps({**DEEPSEEK_V3, **sizes}, indent=1))
    config = DeepseekV3Config.from_pretrained(directory)
    tensors = {"model.layers.0.input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    layer = deepseek.DeepseekV3Attention(config, layer_idx=0)
    for name, weight in layer.named_parameters(prefix="model.layers.0.self_attn"):
        if weight.dim() == 1:  # the layer norms stay bf16
            tensors[name] = weight.bfloat16()
        else:
            tensors[name], tensors[name + "_scale_inv"] = quantize(weight.normal_(std=config.initializer_range))
    shards = {f"model-0000{i + 1}-of-00002.safetensors": list(tensors)[i::2] for i in range(2)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, directory / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_layer(directory: Path, layer_idx: int, config: Any) -> tuple[Any, Tensor]:
    """transformers' own layer on the dequantized weights, in fp32, and the weight of the norm before it."""
    prefix, tensors = f"model.layers.{layer_idx}.", {}
    for name, path in tensor_files(directory).items():
        if name.startswith((prefix + "self_attn.", prefix + "input_layernorm.")):
            with safe_open(path, framework="pt") as file:
                tensors[name.removeprefix(prefix)] = file.get_tensor(name).clone()
    for scale_name in [name for name in tensors if name.endswith("_scale_inv")]:
        name, scale_fmt = scale_name.removesuffix("_scale_inv"), config.quantization_config.get("scale_fmt")
        scale = decode_scale("read_layer", tensors.pop(scale_name), scale_fmt)
        scale = repeat(scale, "n k -> (n a) (k b)", a=GROUP, b=GROUP)
        tensors[name] = tensors[name].float() * scale[: tensors[name].shape[0], : tensors[name].shape[1]]
    norm = tensors.pop("input_layernorm.weight")
    layer = deepseek.DeepseekV3Attention(config, layer_idx)
    layer.load_state_dict({name.removeprefix("self_attn."): tensor for name, tensor in tensors.items()})
    return layer.eval(), norm


def now_us(device: torch.device) -> float:
    """The time once all work before is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e6


def decode_step(
    layer: Any, weights: AbsorbedWeights, x: Tensor, rope: list[Tensor], cache: Tensor, position: int
) -> tuple[Tensor, list[float]]:
    """x [S, hidden] -> attention's output [S, hidden] and µs a stage; writes `position` of cache [S, tokens, R+P]."""
    marks = [now_us(x.device)]
    lora, nope = weights.kv_lora_rank, weights.qk_nope_head_dim
    q = rearrange(layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x))), "s (h d) -> s h d", h=weights.num_heads)
    latent, k_pe = layer.kv_a_proj_with_mqa(x).split([lora, layer.qk_rope_head_dim], dim=-1)
    q_pe, k_pe = deepseek.apply_rotary_pos_emb_interleave(q[..., nope:], rearrange(k_pe, "s p -> s 1 p"), *rope)
    cache[:, position, :lora] = layer.kv_a_layernorm(latent)
    cache[:, position, lora:] = rearrange(k_pe, "s 1 p -> s p")
    marks.append(now_us(x.device))
    q = absorb_q(q[..., :nope], weights.w_uk, weights.w_uk_scale, q_pe)
    marks.append(now_us(x.device))
    latents = cache[:, : position + 1].split([lora, layer.qk_rope_head_dim], dim=-1)
    o_latent = attend_latents(rearrange(q, "s h c -> s 1 h c"), *latents, scale=layer.scaling)
    marks.append(now_us(x.device))
    v = v_up(rearrange(o_latent, "s 1 h r -> s h r"), weights.w_uv, weights.w_uv_scale)
    marks.append(now_us(x.device))
    out = layer.o_proj(rearrange(v, "s h v -> s (h v)"))
    marks.append(now_us(x.device))
    return out, [end - begin for begin, end in pairwise(marks)]


def decode(directory: Path, layer_idx: int, batch: int, steps: int, device: torch.device) -> bool:
    """Decode `steps` tokens of `batch` sequences and print as it goes; whether the error stays within its bound."""
    weights = AbsorbedWeights.from_safetensors(directory, layer_idx).to(device)
    config = DeepseekV3Config.from_pretrained(directory, attn_implementation="eager")
    exact, norm = read_layer(directory, layer_idx, config)
    layer = copy.deepcopy(exact).to(device, torch.bfloat16)
    del layer.kv_b_proj  # AbsorbedWeights stand for it
    exact, exact_cache, rotary = exact.to(device), DynamicCache(), deepseek.DeepseekV3RotaryEmbedding(config).to(device)
    room = math.ceil(steps / backends.PAGE) * backends.PAGE  # tokens, so that FlashMLA can read it
    cache = torch.zeros(batch, room, config.kv_lora_rank + config.qk_rope_head_dim, dtype=torch.bfloat16, device=device)

    console = Console()
    console.print(weights, soft_wrap=True)
    console.print(f"{'position':>8}{'error':>9}" + "".join(f"{stage + ' µs':>13}" for stage in STAGES), soft_wrap=True)
    errors, spreads, times_us = [], [], []
    with Progress(console=console, transient=True) as progress:
        for position in progress.track(range(steps), description="decoding"):
            x = (torch.randn(batch, config.hidden_size) * norm.float()).to(device, torch.bfloat16)
            rope = rotary(x.float(), torch.full((batch, 1), position, device=device))
            step_rope = [rearrange(t, "s 1 p -> s p").bfloat16() for t in rope]
            out, stages_us = decode_step(layer, weights, x, step_rope, cache, position)
            want, softmax = exact(rearrange(x.float(), "s c -> s 1 c"), rope, None, past_key_values=exact_cache)
            errors.append(float((out.float() - want[:, 0]).norm() / want.norm()))
            spreads.append(float(softmax.clamp_min(1e-30).log().std(-1, correction=0).square().mean().sqrt()))
            times_us.append(stages_us)
            cells = "".join(f"{us:>13.1f}" for us in stages_us)
            console.print(f"{position:>8}{errors[-1]:>9.2e}{cells}", soft_wrap=True)

    table = Table(title=f"{steps} steps, batch {batch}, {weights.num_heads} heads, {device}", show_header=False)
    for stage, column in zip(STAGES, zip(*times_us, strict=True), strict=True):
        table.add_row(stage, f"{statistics.median(column):.1f} µs (median)")
    fp8_bytes, bf16_bytes = weights.memory_bytes, 2 * (weights.w_uk.numel() + weights.w_uv.numel())
    table.add_row("weights in FP8, with scales", f"{fp8_bytes:,} bytes")
    table.add_row("weights in bf16", f"{bf16_bytes:,} bytes ({bf16_bytes / fp8_bytes:.2f}x)")
    bound = error_bound(max(spreads))
    kept = all(error <= bound for error in errors)  # false for NaN
    table.add_row("largest relative error", f"{max(errors):.2e}")
    table.add_row(f"bound, logits spread {max(spreads):.2f}", f"{bound:.2e}: {'kept' if kept else 'BROKEN'}")
    console.print(table)
    return kept


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=16, help="heads of the layer that is built (DeepSeek-V3: 128)")
    parser.add_argument("--hidden", type=int, default=1024, help="its hidden size (DeepSeek-V3: 7168)")
    parser.add_argument("--checkpoint", type=Path, help="directory of DeepSeek-V3 or R1 shards to take a layer of")
    parser.add_argument("--layer", type=int, default=0, help="the layer of the checkpoint")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args(arguments)
    if min(options.heads, options.hidden, options.batch, options.steps) < 1:
        parser.error("--heads, --hidden, --batch and --steps must be at least 1")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as built:
        directory = options.checkpoint or Path(built)
        if options.checkpoint is None:
            write_checkpoint(directory, options.heads, options.hidden)
        try:
            kept = decode(directory, options.layer, options.batch, options.steps, options.device)
        except ValueError as error:
            parser.error(str(error))
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
