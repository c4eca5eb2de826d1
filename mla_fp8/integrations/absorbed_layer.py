"""What an enabled MLA layer holds: its two absorbed products, and when they are the cheaper way."""

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mla_fp8.errors import require
from mla_fp8.formats import ACTIVATIONS, E4M3
from mla_fp8.ops import absorb_q, v_up
from mla_fp8.weights import AbsorbedWeights

DIMS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# A multiplication of the absorbed way, whose rows are wider and whose logits are fp32, costs this many of the expanded
# way's, by device. On 128, 512, 2048 and 8192 tokens in bf16 the ways cross (benchmarks/layers/prefill.py)
#   on CPUs with 16 heads              at 37, 65 to 85, 85 to 90 and 110 queries; this rule says 47, 78, 94 and 99
#   on an H100, in a graph, 16 heads   at 28, 81, 129 and 104
#                           128 heads  at 39, 57, 52 and 50; this rule says 34, 56, 67 and 70 on a GPU
ABSORBED_COST = {"cpu": 1.5, "cuda": 2.0}


class AbsorbedLayer:
    """The interface that attention sees; `layer` is the attention module, with transformers' attribute names."""

    prefill_threshold: int | None
    previous: str  # the attention implementation to go back to

    def absorb(self, layer: Any, query: Tensor) -> Tensor:
        """[B, H, S, D+P] -> [B, S, H, R+P]"""
        raise NotImplementedError

    def up(self, layer: Any, o_latent: Tensor) -> Tensor:
        """[B, S, H, R] -> [B, S, H, V]"""
        raise NotImplementedError

    def expand(self, layer: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, 1, T, R] and [B, 1, T, P] -> keys [B, H, T, D+P] and values [B, H, T, V]."""
        return type(layer).expand_kv(layer, kv_nope, k_rot)

    def takes(self, layer: Any, query: Tensor, kv_nope: Tensor) -> bool:
        """Whether these queries run absorbed."""
        if self.prefill_threshold is not None:
            return query.shape[2] < self.prefill_threshold
        dims = (getattr(layer, dim) for dim in DIMS)
        return absorbed_is_cheaper(query.shape[2], kv_nope.shape[2], *dims, device=query.device.type)


class UnquantizedLayer(AbsorbedLayer, nn.Module):
    """Plain products with kv_b_proj's own weights, in their dtype; nothing is copied."""

    def absorb(self, layer: Any, query: Tensor) -> Tensor:
        q_nope, q_pe = query.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
        return torch.cat([q_nope @ self.heads(layer)[0], q_pe], dim=-1).transpose(1, 2)

    def up(self, layer: Any, o_latent: Tensor) -> Tensor:
        return torch.einsum("bshr,hvr->bshv", o_latent, self.heads(layer)[1])

    def heads(self, layer: Any) -> tuple[Tensor, Tensor]:
        """W_UK [H, D, R] and W_UV [H, V, R], views."""
        dims = [layer.qk_nope_head_dim, layer.v_head_dim]
        w_uk, w_uv = layer.kv_b_proj.weight.view(-1, sum(dims), layer.kv_lora_rank).split(dims, dim=1)
        return w_uk, w_uv


class Fp8Layer(AbsorbedLayer, AbsorbedWeights):
    """The package's ops. A submodule of the layer, so that it moves with it, but never in a state_dict."""

    activations: str  # of both products: "exact" or "fp8"

    @classmethod
    def of(cls, name: str, layer: Any, activations: str, checkpoint: str | Path | None) -> "Fp8Layer":
        """The weights of the layer of that name, on kv_b_proj's device."""
        state: Any
        weight, dims = layer.kv_b_proj.weight, {dim: getattr(layer, dim) for dim in ("qk_nope_head_dim", "v_head_dim")}
        heads = weight.shape[0] // sum(dims.values())  # of this rank
        if checkpoint is not None:
            state = cls.from_safetensors(checkpoint, layer.layer_idx, name=f"{name}.kv_b_proj").to(weight.device)
            got, want = [state.num_heads, state.kv_lora_rank], [heads, layer.kv_lora_rank]
            require(got == want, "enable", "checkpoint", f"hold {name} of {want} heads and R", got)
        elif weight.dtype == E4M3:
            state = cls.from_kv_b_proj(weight, layer.kv_b_proj.weight_scale_inv, heads, **dims)
        else:
            state = cls.from_bf16(weight, heads, **dims)
        state.activations = activations
        return state

    def absorb(self, layer: Any, query: Tensor) -> Tensor:
        q = query.transpose(1, 2).flatten(0, 1)  # [B*S, H, D+P], a view where B or S is 1
        q_nope, q_pe = q.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
        q = absorb_q(q_nope, self.w_uk, self.w_uk_scale, q_pe, activations=self.activations)
        return q.unflatten(0, (query.shape[0], query.shape[2]))

    def up(self, layer: Any, o_latent: Tensor) -> Tensor:
        v = v_up(o_latent.flatten(0, 1), self.w_uv, self.w_uv_scale, activations=self.activations)
        return v.unflatten(0, o_latent.shape[:2])

    def expand(self, layer: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        if layer.kv_b_proj.weight.dtype != E4M3:
            return super().expand(layer, kv_nope, k_rot)
        w_uk, w_uv = (w.to(kv_nope.dtype) for w in self.dequantize())  # transformers' FP8Linear would fetch a kernel
        k_rot = k_rot.expand(-1, self.num_heads, -1, -1)
        return torch.cat([kv_nope @ w_uk.mT, k_rot], dim=-1), kv_nope @ w_uv.mT

    def takes(self, layer: Any, query: Tensor, kv_nope: Tensor) -> bool:
        if query.dtype in ACTIVATIONS:
            return super().takes(layer, query, kv_nope)
        warn_once(f"mla_fp8: the ops take bfloat16 and float16, got {query.dtype}: enabled layers run expanded")
        return False

    def _save_to_state_dict(self, *_: Any) -> None: ...

    def _load_from_state_dict(self, *_: Any) -> None: ...


def absorbed_is_cheaper(
    queries: int, tokens: int, lora: int, nope: int, rope: int, v_dim: int, *, device: str = "cpu"
) -> bool:
    """Whether S queries on T cached tokens cost less absorbed than expanded, counted in multiplications of a head."""
    absorbed = queries * (nope + v_dim) * lora + queries * tokens * (2 * lora + rope)
    expanded = tokens * (nope + v_dim) * lora + queries * tokens * (nope + rope + v_dim)
    return ABSORBED_COST.get(device, ABSORBED_COST["cpu"]) * absorbed <= expanded


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
