"""A random FP8 checkpoint of DeepSeek-V3's attention shapes, small enough to load in seconds.

    python -m benchmarks.engines.checkpoint DIRECTORY [--layers 4] [--heads 128] [--hidden 2048] [--device cuda]

Every layer is dense (first_k_dense_replace = layers), so that no MoE kernel is needed; linear
weights are e4m3 with an fp32 scale a 128x128 block, as in the published checkpoints. Position
embedding is plain RoPE, without YaRN. One file, model.safetensors, beside config.json.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mla_fp8.formats import E4M3, FP8_MAX, GROUP

FILE = "model.safetensors"
HEAD_STD = 3.0  # of a logit: the best token leads by some tenths of a nat, as in a trained model
NORM_STD = 0.1  # of a norm's weights around 1, so that one left out shows


@dataclass(frozen=True)
class Shape:
    """What config.json says; the defaults are DeepSeek-V3's, but for the model's width and depth."""

    num_hidden_layers: int = 4
    num_attention_heads: int = 128
    hidden_size: int = 2048
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    vocab_size: int = 1024

    def linears(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of a layer's linear weights, by their names in the checkpoint."""
        heads, hidden = self.num_attention_heads, self.hidden_size
        return {
            "self_attn.q_a_proj": (self.q_lora_rank, hidden),
            "self_attn.q_b_proj": (heads * (self.qk_nope_head_dim + self.qk_rope_head_dim), self.q_lora_rank),
            "self_attn.kv_a_proj_with_mqa": (self.kv_lora_rank + self.qk_rope_head_dim, hidden),
            "self_attn.kv_b_proj": (heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank),
            "self_attn.o_proj": (hidden, heads * self.v_head_dim),
            "mlp.gate_proj": (hidden, hidden),
            "mlp.up_proj": (hidden, hidden),
            "mlp.down_proj": (hidden, hidden),
        }

    def norms(self) -> dict[str, int]:
        return {
            "input_layernorm": self.hidden_size,
            "post_attention_layernorm": self.hidden_size,
            "self_attn.q_a_layernorm": self.q_lora_rank,
            "self_attn.kv_a_layernorm": self.kv_lora_rank,
        }

    def config(self) -> dict[str, Any]:
        experts = {  # of no layer, but an engine reads them
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 256,
            "moe_layer_freq": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        }
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "torch_dtype": "bfloat16",
            **asdict(self),
            "num_key_value_heads": self.num_attention_heads,
            "intermediate_size": self.hidden_size,
            "first_k_dense_replace": self.num_hidden_layers,
            "num_nextn_predict_layers": 0,
            "max_position_embeddings": 16384,
            "rope_theta": 10000,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **experts,
            "quantization_config": {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "weight_block_size": [GROUP, GROUP],
            },
        }


def expand(scale: Tensor, rows: int, columns: int) -> Tensor:
    """A scale a block -> a scale an element; the last blocks of rows and columns may be cut."""
    return scale.repeat_interleave(GROUP, 0)[:rows].repeat_interleave(GROUP, 1)[:, :columns]


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N,K] -> e4m3 [N,K] and fp32 [ceil(N/128), ceil(K/128)], with weight ≈ val * scale."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % GROUP, 0, -rows % GROUP))
    blocks = padded.view(padded.shape[0] // GROUP, GROUP, padded.shape[1] // GROUP, GROUP)
    scale = blocks.abs().amax((1, 3)) / FP8_MAX
    return (weight / expand(scale, rows, columns)).to(E4M3), scale


def tensors(shape: Shape, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, on the CPU; a device and a seed always give the same."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*extents: int) -> Tensor:
        return torch.randn(*extents, generator=generator, device=device)

    hidden, made = shape.hidden_size, {}
    made["model.embed_tokens.weight"] = normal(shape.vocab_size, hidden).bfloat16()
    made["lm_head.weight"] = (normal(shape.vocab_size, hidden) * HEAD_STD * hidden**-0.5).bfloat16()
    made["model.norm.weight"] = (1 + NORM_STD * normal(hidden)).bfloat16()
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name, extent in shape.norms().items():
            made[f"{prefix}{name}.weight"] = (1 + NORM_STD * normal(extent)).bfloat16()
        for name, (rows, columns) in shape.linears().items():
            val, scale = quantize(normal(rows, columns) * columns**-0.5)
            made[f"{prefix}{name}.weight"], made[f"{prefix}{name}.weight_scale_inv"] = val.cpu(), scale.cpu()
    return {name: tensor.cpu() for name, tensor in made.items()}


def write(directory: Path, shape: Shape, seed: int = 0, device: str = "cpu") -> int:
    """Returns the bytes of all tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    made = tensors(shape, seed, torch.device(device))
    save_file(made, directory / FILE, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n")
    return sum(tensor.nbytes for tensor in made.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 128")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.hidden % GROUP:
        parser.error(f"--hidden must be a multiple of {GROUP}, got {options.hidden}")
    shape = Shape(options.layers, options.heads, options.hidden)
    size = write(options.directory, shape, options.seed, options.device)
    print(f"{options.directory}: {options.layers} layers, {options.heads} heads, {size >> 20} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
