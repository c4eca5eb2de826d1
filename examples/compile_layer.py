"""torch.compile through an MLA decode layer: one graph, no break, and no second compilation when S changes.

x [S, hidden] -> RMSNorm -> q projection -> absorb_q -> attention over latents [S, T, 576] -> v_up -> o_proj
"""

import torch
from torch import Tensor, nn

from mla_fp8 import AbsorbedWeights, absorb_q, v_up

NOPE, ROPE, LORA, V_DIM = 128, 64, 512, 128  # DeepSeek-V3's qk_nope_, qk_rope_head_dim, kv_lora_rank, v_head_dim
TOKENS = (6, 2, 64, 300)  # S = 0 and 1 would compile once more: torch.compile takes them for constants
BF16_NOISE = 8e-3  # some ten roundings of 1.7e-3 in the eager layer, and others where Inductor fuses: independent


class DecodeLayer(nn.Module):
    """One step for S sequences, each with its own T cached latents; random weights, RoPE left out."""

    def __init__(self, heads: int, hidden: int, activations: str = "exact") -> None:
        super().__init__()
        self.activations = activations
        self.norm = nn.RMSNorm(hidden, eps=1e-6, dtype=torch.bfloat16)
        self.q_proj = nn.Linear(hidden, heads * (NOPE + ROPE), bias=False, dtype=torch.bfloat16)
        self.o_proj = nn.Linear(heads * V_DIM, hidden, bias=False, dtype=torch.bfloat16)
        self.weights = AbsorbedWeights.from_bf16(torch.randn(heads * (NOPE + V_DIM), LORA) * LORA**-0.5, heads)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        q_nope, q_pe = self.q_proj(self.norm(x)).unflatten(-1, (-1, NOPE + ROPE)).split([NOPE, ROPE], dim=-1)
        w_uk, w_uk_scale, w_uv, w_uv_scale = self.weights.buffers()
        q = absorb_q(q_nope, w_uk, w_uk_scale, q_pe, activations=self.activations)
        logits = (q @ latents.mT).float() * (NOPE + ROPE) ** -0.5  # all heads of a sequence share its latents
        o_latent = logits.softmax(dim=-1).to(x.dtype) @ latents[..., :LORA]
        return self.o_proj(v_up(o_latent, w_uv, w_uv_scale, activations=self.activations).flatten(1))


def inputs(tokens: int, hidden: int, device: str, context: int = 32) -> tuple[Tensor, Tensor]:
    x, latents = torch.randn(tokens, hidden), torch.randn(tokens, context, LORA + ROPE)
    return x.to(device, torch.bfloat16), latents.to(device, torch.bfloat16)


@torch.no_grad()
def main(heads: int = 16, hidden: int = 512) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = DecodeLayer(heads, hidden).to(device)
    compiled = torch.compile(layer, fullgraph=True)  # fullgraph: a graph break would be an error
    for tokens in TOKENS:
        arguments = inputs(tokens, hidden, device)
        for argument in arguments:
            torch._dynamo.mark_dynamic(argument, 0)
        torch.compiler.set_stance("default" if tokens == TOKENS[0] else "fail_on_recompile")
        want = layer(*arguments).float()
        error = float((compiled(*arguments).float() - want).norm() / want.norm())
        print(f"S = {tokens:3} on {device}: compiled against eager {error:.1e}, bound {BF16_NOISE:.1e}")
        if not error <= BF16_NOISE:
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
