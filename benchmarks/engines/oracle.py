"""Log-probabilities by fp32 arithmetic on a checkpoint's FP8 blocks: what every engine is compared with.

    python -m benchmarks.engines.oracle CHECKPOINT --json oracle.json [--device cuda]

Plain PyTorch, teacher-forced: weights are e4m3 * scale in fp32, activations are never quantized,
keys and values of all heads are made (no absorbed products), TF32 is off. An engine rounds to bf16
and quantizes activations, stock as well as with the plugin, so this is the common yardstick.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from ..bench.report import write_json
from .checkpoint import FILE, expand
from .texts import Size, Text, texts

LABEL = "oracle"
TEXTS_AT_ONCE = 8  # attention's scores are fp32 [texts,H,T,T]


def weights_of(directory: Path, device: torch.device) -> dict[str, Tensor]:
    """All in fp32, FP8 ones multiplied by their scales."""
    stored = load_file(directory / FILE, device=str(device))
    result = {}
    for name, tensor in stored.items():
        scale = stored.get(f"{name}_scale_inv")
        if not name.endswith("_scale_inv"):
            result[name] = tensor.float() if scale is None else tensor.float() * expand(scale, *tensor.shape)
    return result


def rotate(x: Tensor, theta: float) -> Tensor:
    """RoPE of x [...,T,P] at positions 0 to T-1, of neighbours (0,1), (2,3), ..., as DeepSeek-V3 pairs them."""
    tokens, columns = x.shape[-2:]
    exponents = torch.arange(0, columns, 2, device=x.device, dtype=torch.float64) / columns
    angles = torch.arange(tokens, device=x.device, dtype=torch.float64)[:, None] * theta**-exponents
    cos, sin = angles.cos().float(), angles.sin().float()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Oracle:
    def __init__(self, directory: Path, device: torch.device) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        if self.config["first_k_dense_replace"] < self.config["num_hidden_layers"] or self.config.get("rope_scaling"):
            raise ValueError("oracle: checkpoint must have dense layers only, and RoPE without scaling")
        self.weights, self.device = weights_of(directory, device), device

    def norm(self, x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"])

    def attention(self, x: Tensor, name: str) -> Tensor:
        """x [B,T,hidden] -> the same, each token over those up to itself."""
        config, (batch, tokens, _) = self.config, x.shape
        nope, pe, v_dim, rank = (
            config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        )

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (config["num_attention_heads"], -1)).transpose(1, 2)  # [B,H,T,...]

        q = heads(
            self.linear(self.norm(self.linear(x, f"{name}.q_a_proj"), f"{name}.q_a_layernorm"), f"{name}.q_b_proj")
        )
        latent, k_pe = self.linear(x, f"{name}.kv_a_proj_with_mqa").split((rank, pe), -1)
        kv = heads(self.linear(self.norm(latent, f"{name}.kv_a_layernorm"), f"{name}.kv_b_proj"))
        q_nope, q_pe = q.split((nope, pe), -1)
        k_nope, v = kv.split((nope, v_dim), -1)
        theta = config["rope_theta"]
        scores = q_nope @ k_nope.mT + rotate(q_pe, theta) @ rotate(k_pe, theta)[:, None].mT
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        shares = (scores * (nope + pe) ** -0.5).masked_fill(later, float("-inf")).softmax(-1)
        return self.linear((shares @ v).transpose(1, 2).reshape(batch, tokens, -1), f"{name}.o_proj")

    @torch.no_grad()
    def log_probs(self, tokens: Tensor) -> Tensor:
        """int64 [B,T] -> fp32 [B,T,vocabulary], of what follows each token."""
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.self_attn")
            y = self.norm(x, f"{name}.post_attention_layernorm")
            gated = functional.silu(self.linear(y, f"{name}.mlp.gate_proj")) * self.linear(y, f"{name}.mlp.up_proj")
            x = x + self.linear(gated, f"{name}.mlp.down_proj")
        return self.linear(self.norm(x, "model.norm"), "lm_head").log_softmax(-1)

    def row(self, index: int, text: Text, log_probs: Tensor) -> dict[str, Any]:
        """As a forced run's row, of decode positions; log_probs [T,vocabulary] of prompt and continuation."""
        first = len(text.prompt)  # the token that the first decode step reads is the first forced one
        at = log_probs[first : first + len(text.continuation) - 1]
        best = at.topk(2)
        forced = torch.tensor(text.continuation[1:], device=at.device)
        return {
            "measure": "forced",
            "label": LABEL,
            "sequence": index,
            "best": best.indices[:, 0].tolist(),
            "best_logprob": best.values[:, 0].tolist(),
            "second_logprob": best.values[:, 1].tolist(),
            "forced_logprob": at.gather(1, forced[:, None])[:, 0].tolist(),
        }

    def rows(self, given: list[Text]) -> list[dict[str, Any]]:
        result = []
        for start in range(0, len(given), TEXTS_AT_ONCE):
            part = given[start : start + TEXTS_AT_ONCE]
            whole = [torch.tensor(text.prompt + text.continuation) for text in part]
            padded = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)  # what follows a text does not change it
            log_probs = self.log_probs(padded.to(self.device))
            result += [self.row(start + at, text, log_probs[at]) for at, text in enumerate(part)]
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    oracle, size = Oracle(options.checkpoint, torch.device(options.device)), Size()
    rows = oracle.rows(texts(size, oracle.config["vocab_size"]))
    facts = {"heads": oracle.config["num_attention_heads"], "layers": oracle.config["num_hidden_layers"]}
    write_json(options.json, rows, facts)
    print(f"{options.json}: {size.positions} positions of {size.sequences} texts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
