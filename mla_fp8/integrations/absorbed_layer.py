"""What an enabled MLA layer holds: its two absorbed products, and when they are the cheaper way."""

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mla_fp8.errors import require
from mla_fp8.formats import ACTIVATIONS, E4M3
from mla_fp8.integrations import projection
from mla_fp8.integrations.fingerprint import Fingerprint
from mla_fp8.ops import absorb_q, v_up
from mla_fp8.weights import AbsorbedWeights
from mla_fp8.weights.file import BUFFERS

DIMS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# A multiplication of the absorbed way, whose rows are wider and whose logits are fp32, costs this many of the expanded
# way's, by device. On 128, 512, 2048 and 8192 tokens in bf16 the ways cross (benchmarks/layers/prefill.py)
#   on CPUs with 16 heads              at 37, 65 to 85, 85 to 90 and 110 queries; this rule says 47, 78, 94 and 99
#   on an H100, in a graph, 16 heads   at 28, 81, 129 and 104
#                           128 heads  at 39, 57, 52 and 50; this rule says 34, 56, 67 and 70 on a GPU
ABSORBED_COST = {"cpu": 1.5, "cuda": 2.0}


AGAIN = "disable, and enable with the new checkpoint for its own blocks"


class AbsorbedLayer:
    """The interface that attention sees; `layer` is the attention module, with transformers' attribute names.

    What it holds follows kv_b_proj: a `Fingerprint` tells, before every absorbed step, whether it may have changed.
    """

    weights: str  # as `enable` takes it
    name: str  # of the layer
    activations: str  # of both products: "exact" or "fp8"
    prefill_threshold: int | None
    previous: str  # the attention implementation to go back to
    seen: Fingerprint
    off: str | None = None  # why it runs expanded, until kv_b_proj changes again

    def absorb(self, layer: Any, query: Tensor) -> Tensor:
        """[B, H, S, D+P] -> [B, S, H, R+P]"""
        raise NotImplementedError

    def up(self, layer: Any, o_latent: Tensor) -> Tensor:
        """[B, S, H, R] -> [B, S, H, V]"""
        raise NotImplementedError

    def take(self, layer: Any, source: projection.Source) -> None:
        """Hold what kv_b_proj computes now; ValueError where it cannot."""
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

    def follows(self, layer: Any) -> bool:
        """Whether it holds what kv_b_proj computes, if need be after taking it over now.

        PEFT hands `adapter_names`, an adapter a sequence, to its layers by hooks for the time of a forward: not held.
        """
        module = layer._modules["kv_b_proj"]
        if torch.compiler.is_compiling():  # nothing is read here; an adapter may be switched without a write
            return self.off is None and not projection.is_switched(module)
        if not self.seen.matches(module):
            self.refresh(layer)
        return self.off is None and not (module._forward_pre_hooks and projection.is_adapted(module))

    def refresh(self, layer: Any) -> None:
        """Take over what kv_b_proj computes now; where that cannot be absorbed, say so and run expanded."""
        module = layer.kv_b_proj
        if not projection.offload_hooks(module) and any(p.is_meta for p in module.parameters()):
            return  # moved away, and not yet back
        capturing = module_is_on_cuda(module) and torch.cuda.is_current_stream_capturing()
        require(not capturing, "enable", f"kv_b_proj of {self.name}", "not change before a capture", "a change")
        self.off = projection.why_not_weight(layer, self.weights)
        if self.off is None:
            try:
                source = projection.read(module)
                self.off = projection.why_not_computed(module, source)
                if self.off is None:
                    self.take(layer, source)
            except ValueError as error:
                self.off = str(error)
        self.seen = Fingerprint(module)
        if self.off is not None:
            warn_once(f"mla_fp8: {self.name}: kv_b_proj changed and runs expanded: {self.off}")


class UnquantizedLayer(AbsorbedLayer, nn.Module):
    """Plain products with kv_b_proj's own weights, in their dtype; copied only where an adapter is merged."""

    weights = "unquantized"
    merged: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("merged", None, persistent=False)

    @classmethod
    def of_source(cls, layer: Any, source: projection.Source) -> "UnquantizedLayer":
        state = cls()
        state.take(layer, source)
        return state

    def take(self, layer: Any, source: projection.Source) -> None:
        """Plain weights are read where they are, in every step."""
        module = layer.kv_b_proj
        self.merged = source.weight.to(projection.base(module).weight.dtype) if projection.is_adapted(module) else None

    def absorb(self, layer: Any, query: Tensor) -> Tensor:
        q_nope, q_pe = query.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
        return torch.cat([q_nope @ self.heads(layer)[0], q_pe], dim=-1).transpose(1, 2)

    def up(self, layer: Any, o_latent: Tensor) -> Tensor:
        return torch.einsum("bshr,hvr->bshv", o_latent, self.heads(layer)[1])

    def heads(self, layer: Any) -> tuple[Tensor, Tensor]:
        """W_UK [H, D, R] and W_UV [H, V, R], views."""
        dims = [layer.qk_nope_head_dim, layer.v_head_dim]
        if self.merged is not None:
            weight = self.merged
        elif projection.is_offloaded(layer.kv_b_proj):
            weight = projection.read(layer.kv_b_proj).weight
        else:
            weight = projection.local(layer.kv_b_proj.weight)
        w_uk, w_uv = weight.view(-1, sum(dims), layer.kv_lora_rank).split(dims, dim=1)
        return w_uk, w_uv


class Fp8Layer(AbsorbedLayer, AbsorbedWeights):
    """The package's ops. A submodule of the layer, so that it moves with it, but never in a state_dict."""

    weights = "fp8"
    from_checkpoint = False  # and not from the module, which may be rounded, or have no values
    is_fp8_module = False  # whose own forward would fetch a kernel

    @classmethod
    def of_source(cls, layer: Any, source: projection.Source) -> "Fp8Layer":
        state: Any
        dims = {dim: getattr(layer, dim) for dim in ("qk_nope_head_dim", "v_head_dim")}
        heads = source.weight.shape[0] // sum(dims.values())  # of this rank
        if source.weight_scale_inv is not None:
            state = cls.from_kv_b_proj(source.weight, source.weight_scale_inv, heads, **dims)
        else:
            state = cls.from_bf16(source.weight, heads, **dims)
        state._non_persistent_buffers_set.update(BUFFERS)  # which offloading leaves where the layer runs
        state.is_fp8_module = source.weight_scale_inv is not None
        return state

    @classmethod
    def of_checkpoint(cls, layer: Any, directory: str | Path, name: str) -> "Fp8Layer":
        """The rows of this rank, whatever the module holds."""
        state: Any
        weight = getattr(layer.kv_b_proj, "weight", None)
        rank, size = projection.share(weight)
        state = cls.from_safetensors(directory, layer.layer_idx, rank, size, name=name, quantize_bf16=True)
        got, want = [state.num_heads, state.kv_lora_rank], [layer.num_heads // size, layer.kv_lora_rank]
        require(got == want, "enable", "checkpoint", f"hold {name} of {want} heads and R", got)
        state = state.to(projection.device_of(layer))
        state._non_persistent_buffers_set.update(BUFFERS)
        state.from_checkpoint = True
        state.is_fp8_module = getattr(weight, "dtype", None) == E4M3
        return state

    def take(self, layer: Any, source: projection.Source) -> None:
        if self.from_checkpoint:
            if projection.same_numbers(source, *self.dequantize()):
                return
            changed = "mla_fp8: kv_b_proj is no longer that of enable(checkpoint=...)"
            warn_once(f"{changed}: its layers are quantized from the module; {AGAIN}")
        fresh = type(self).of_source(layer, source)
        self.from_checkpoint, self.is_fp8_module = False, fresh.is_fp8_module
        self.to(source.weight.device)
        for name in BUFFERS:
            buffer, new = getattr(self, name), getattr(fresh, name)
            is_view = buffer.untyped_storage().nbytes() > buffer.nbytes  # of a tensor that others may hold
            if is_view or buffer.shape != new.shape or buffer.is_inference():
                setattr(self, name, new)
            else:
                buffer.copy_(new)  # in place, for compiled code and CUDA graphs

    def absorb(self, layer: Any, query: Tensor) -> Tensor:
        q = query.transpose(1, 2).flatten(0, 1)  # [B*S, H, D+P], a view where B or S is 1
        q_nope, q_pe = q.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
        q = absorb_q(q_nope, self.w_uk, self.w_uk_scale, q_pe, activations=self.activations)
        return q.unflatten(0, (query.shape[0], query.shape[2]))

    def up(self, layer: Any, o_latent: Tensor) -> Tensor:
        v = v_up(o_latent.flatten(0, 1), self.w_uv, self.w_uv_scale, activations=self.activations)
        return v.unflatten(0, o_latent.shape[:2])

    def expand(self, layer: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_fp8_module or not self.follows(layer):
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


def module_is_on_cuda(module: nn.Module) -> bool:
    return any(p.is_cuda for p in module.parameters())


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
