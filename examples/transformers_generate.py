"""Generate with a transformers MLA model as it is, then absorbed over its latent cache: in fp32, then from FP8 weights.

Builds a small random DeepSeek-V3 with the published head dims. With --model: loads one, whose kv_b_proj is read in FP8
from --checkpoint where that is given. In bf16 it runs as it is, with exact activations and with FP8 activations."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from mla_fp8.integrations.transformers import enabled

SMALL: dict[str, Any] = {"hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 1024}
SMALL |= {"num_hidden_layers": 4, "first_k_dense_replace": 4, "eos_token_id": None}


def generate(name: str, model: Any, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy tokens [batch, steps]; prints their rate."""
    begin = time.perf_counter()
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False)
    print(f"{name}: {tokens[0, ids.shape[1] :].tolist()}, {steps / (time.perf_counter() - begin):.1f} steps/s")
    return tokens[:, ids.shape[1] :]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a transformers model with latent attention")
    parser.add_argument("--checkpoint", type=Path, help="directory of its FP8 checkpoint")
    parser.add_argument("--context", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=8, help="tokens to generate")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model: Any
    if options.model is None:
        print("random weights, random tokens: docs/accuracy.md has the agreement of a trained model on real text")
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL))
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = model.to(options.device).eval()
    ids = torch.randint(2, model.config.vocab_size, (2, options.context), device=options.device)

    want = generate("expanded, fp32", model, ids, options.steps)
    with enabled(model, weights="unquantized"):
        got = {"absorbed": generate("absorbed, fp32", model, ids, options.steps)}
    got["bf16"] = generate("expanded, bf16", model.bfloat16(), ids, options.steps)
    for activations in ("exact", "fp8"):
        with enabled(model, activations=activations, checkpoint=options.checkpoint) as summary:
            got[activations] = generate(f"{activations} activations", model, ids, options.steps)
    print(summary)
    same = ", ".join(f"{name} {(tokens == want).float().mean():.0%}" for name, tokens in got.items())
    print(f"the same tokens as expanded, fp32: {same}")
    return 0 if torch.equal(got["absorbed"], want) else 1


if __name__ == "__main__":
    raise SystemExit(main())
