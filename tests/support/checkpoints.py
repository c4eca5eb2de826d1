"""kv_b_proj of random bytes, and directories in DeepSeek's checkpoint format, sound unless a test breaks them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYER = 3
BASE = f"model.layers.{LAYER}.self_attn.kv_b_proj"
WEIGHT, SCALE = BASE + ".weight", BASE + ".weight_scale_inv"
INDEX = "model.safetensors.index.json"


def kv_b_proj(rng, heads=2, nope=128, v_dim=128, lora=512) -> tuple[Tensor, Tensor]:
    """Every e4m3 code in every row, NaN too, and fp32 scales of any mantissa."""
    rows = heads * (nope + v_dim)
    order = torch.rand(rows, lora, generator=rng).argsort(1) % 256
    weight = order.to(torch.uint8).view(torch.float8_e4m3fn)
    return weight, torch.rand(rows // 128, lora // 128, generator=rng) * 2e-3 + 1e-5


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """As DeepSeek's own weight_dequant: value * scale in fp32."""
    return weight.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)


def head_rows(weight: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """kv_b_proj [H*(D+V), R] -> W_UK [H,D,R], W_UV [H,V,R], row by row of the checkpoint."""
    per_head = weight.reshape(heads, -1, weight.shape[1])
    return per_head[:, :nope], per_head[:, nope:]


def config(heads=2, nope=128, v_dim=128, lora=512, **quantization) -> dict:
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], **quantization}
    dims = {"num_attention_heads": heads, "qk_nope_head_dim": nope, "v_head_dim": v_dim, "kv_lora_rank": lora}
    return {"model_type": "deepseek_v3", **dims, "quantization_config": quantization}


def write_checkpoint(directory: Path, tensors: dict[str, Tensor], model_config: dict, shards: int = 2) -> Path:
    """Tensors dealt to shards in turn, with their index; shards = 0 writes one model.safetensors without an index."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model_config))
    if shards == 0:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for shard in names:
        held = {name: tensors[name] for name, place in weight_map.items() if place == shard}
        save_file(held, directory / shard)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return directory
