"""Generate with a transformers MLA model as it is, then absorbed over its latent cache: exact, then in FP8.

Builds a small random DeepSeek-V3 with the published head dims. With --model: loads one, whose kv_b_proj is read in FP8
from --checkpoint where that is given.
"""

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
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL))
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = model.to(options.device).eval()
    ids = torch.randint(2, model.config.vocab_size, (2, options.context), device=options.device)

    expanded = generate("expanded, fp32", model, ids, options.steps)
    with enabled(model, projections="exact"):
        absorbed = generate("absorbed, fp32", model, ids, options.steps)
    with enabled(model.bfloat16(), checkpoint=options.checkpoint) as summary:
        fp8 = generate("absorbed, FP8 ", model, ids, options.steps)
    print(summary)
    print(f"the same as expanded: fp32 {(absorbed == expanded).float().mean():.0%}", end=", ")
    print(f"FP8 {(fp8 == expanded).float().mean():.0%}")
    return 0 if torch.equal(absorbed, expanded) else 1


if __name__ == "__main__":
    raise SystemExit(main())
