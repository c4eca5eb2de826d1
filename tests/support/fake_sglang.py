"""A stand-in for the `sglang` package: its weight loader, an MLA layer, a hook registry, and what the plugin asks.

Written from what SGLang 0.5.17 and 0.5.23 do, in plain PyTorch. Where they differ, `release` says which is meant.
"""

import enum
import functools
import importlib
import sys
import types

import torch
from helpers import randn
from torch import Tensor, nn

from mla_fp8.formats import E4M3, GROUP
from mla_fp8.integrations import sglang as plugin
from mla_fp8.integrations.sglang_engine import CONTEXT, FORWARD, LOADER, OFFLOADER

RELEASES = ("0.5.17", "0.5.23")
HEADS, NOPE, V, RANK = 3, 128, 128, 512


class HookType(enum.Enum):
    AROUND = "around"


def _registry() -> type:
    class HookRegistry:
        hooks: list[tuple[str, object, HookType]] = []

        @classmethod
        def register(cls, target, hook, hook_type, *, source=None):
            cls.hooks.append((target, hook, hook_type))

        @classmethod
        def apply_hooks(cls):
            for target, hook, hook_type in cls.hooks:
                assert hook_type is HookType.AROUND
                module, owner, name = target.rsplit(".", 2)
                owner = getattr(importlib.import_module(module), owner)
                original = getattr(owner, name)

                def wrapper(*args, hook=hook, original=original, **kwargs):
                    return hook(original, *args, **kwargs)

                setattr(owner, name, functools.wraps(original)(wrapper))

    return HookRegistry


def bind_or_assign(target, source):
    """As SGLang's: what is there is written to."""
    if target is None:
        return source
    target.copy_(source)
    return target


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    rows, columns = weight.shape
    scales = scale.repeat_interleave(GROUP, 0)[:rows].repeat_interleave(GROUP, 1)[:, :columns]
    return (weight.float() * scales).bfloat16()


def loader_mixin(release: str) -> type:
    class DeepseekV2WeightLoaderMixin:
        calls: list[object] = []  # the weight_names of each call
        fails_at: int | None = None  # a layer

        def post_load_weights(self, is_nextn=False, weight_names=None):
            self.calls.append(weight_names)
            if is_nextn:
                layers = [self.model.decoder]
            elif weight_names is None:
                layers = self.model.layers[self.model.start_layer : self.model.end_layer]
            else:
                ids = sorted({int(name.split(".")[2]) for name in weight_names if "kv_b_proj" in name})
                layers = [self.model.layers[i] for i in ids]
            for layer in layers:
                if release == "0.5.17" or hasattr(layer.self_attn, "kv_b_proj"):
                    if self.fails_at is not None and layer is self.model.layers[self.fails_at]:
                        raise RuntimeError("out of memory")
                    split(layer.self_attn)

    return DeepseekV2WeightLoaderMixin


def split(attention) -> None:
    """w_kc and w_vc of a layer, by the way that its kv_b_proj and its options lead to."""
    projection, heads = attention.kv_b_proj, (-1, attention.qk_nope_head_dim + attention.v_head_dim)
    weight = getattr(projection, "weight", None)
    if attention.deep_gemm:
        both = weight.unflatten(0, heads)
    elif weight is None:  # AWQ
        both = torch.zeros(projection.qweight.shape).bfloat16().unflatten(0, heads)
    elif weight.dtype == E4M3 and hasattr(projection, "weight_scale_inv"):
        both = dequantized(weight, projection.weight_scale_inv.float()).unflatten(0, heads)
    else:
        both = (weight if weight.dtype == E4M3 else weight.bfloat16()).unflatten(0, heads)
    w_kc, w_vc = both.split([attention.qk_nope_head_dim, attention.v_head_dim], dim=1)
    if attention.deep_gemm:
        attention.w_kc, attention.w_vc = w_kc.transpose(1, 2).contiguous(), w_vc.contiguous()
        attention.use_deep_gemm_bmm = True
        return
    attention.w_kc = bind_or_assign(attention.w_kc, w_kc.transpose(1, 2).contiguous().transpose(1, 2))
    attention.w_vc = bind_or_assign(attention.w_vc, w_vc.contiguous().transpose(1, 2))


class DeepseekV2AttentionMLA(nn.Module):
    def __init__(self, rng, heads=HEADS, nope=NOPE, v=V, rank=RANK):
        super().__init__()
        self.num_local_heads, self.qk_nope_head_dim, self.v_head_dim, self.kv_lora_rank = heads, nope, v, rank
        self.w_kc = self.w_vc = None
        self.use_deep_gemm_bmm = self.deep_gemm = False
        self.kv_b_proj = nn.Module()
        rows = heads * (nope + v)
        weight, scale = blocks(rng, rows, rank)
        self.kv_b_proj.weight = nn.Parameter(weight, requires_grad=False)
        self.kv_b_proj.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    def forward(self, q_nope: Tensor, attended: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q_nope [S, H, D] -> [S, H, R]; attention's output [S, H, R], else that itself, -> [S, H*V]."""
        latent = torch.bmm(q_nope.transpose(0, 1), self.w_kc).transpose(0, 1)
        attended = latent if attended is None else attended
        out = torch.empty(q_nope.shape[0], self.num_local_heads * self.v_head_dim, dtype=q_nope.dtype)
        view = out.view(-1, self.num_local_heads, self.v_head_dim).transpose(0, 1)
        torch.bmm(attended.transpose(0, 1), self.w_vc, out=view)
        return latent, out


def blocks(rng, rows: int, rank: int) -> tuple[Tensor, Tensor]:
    weight = randn(rng, rows, rank, dtype=torch.float32).to(E4M3)
    scale = torch.rand(-(-rows // GROUP), -(-rank // GROUP), generator=rng) / 64 + 1 / 256
    return weight, scale


def reload(model, rng, layers=None) -> None:
    """New numbers into the parameters, as a weight loader writes them."""
    for layer in model.model.layers if layers is None else [model.model.layers[i] for i in layers]:
        projection = layer.self_attn.kv_b_proj
        weight, scale = blocks(rng, *projection.weight.shape)
        projection.weight.data.copy_(weight)
        projection.weight_scale_inv.data.copy_(scale)


class Engine(types.SimpleNamespace):
    """The modules, and models that are made of them."""

    def model(self, rng, layers: int = 2, attention=DeepseekV2AttentionMLA, **dims):
        class DeepseekV3ForCausalLM(nn.Module, self.loader.DeepseekV2WeightLoaderMixin):
            pass

        model, inner = DeepseekV3ForCausalLM(), nn.Module()
        inner.layers = nn.ModuleList([nn.Module() for _ in range(layers)])
        for layer in inner.layers:
            layer.self_attn = attention(rng, **dims)
        inner.start_layer, inner.end_layer, model.model = 0, layers, inner
        return model


def install(monkeypatch, release: str = RELEASES[-1], without: str | None = None, method=None) -> Engine:
    """Make `sglang` importable, but for one module, call `register` as its load_plugins does, and apply the hooks."""
    for name in [name for name in sys.modules if name == "sglang" or name.startswith("sglang.")]:
        monkeypatch.delitem(sys.modules, name)
    names = {LOADER, FORWARD, CONTEXT, OFFLOADER, plugin.HOOKS} - {without}
    for name in sorted({".".join(n.split(".")[: i + 1]) for n in names for i in range(n.count(".") + 1)}):
        package = types.ModuleType(name)
        package.__path__ = []  # a package in which nothing can be found
        monkeypatch.setitem(sys.modules, name, package)
    loader, forward, context, offloader, hooks = (
        sys.modules.get(name, types.ModuleType(name)) for name in (LOADER, FORWARD, CONTEXT, OFFLOADER, plugin.HOOKS)
    )
    loader.DeepseekV2WeightLoaderMixin = loader_mixin(release)
    if method is not None:
        loader.DeepseekV2WeightLoaderMixin.post_load_weights = method
    loader._is_cuda, loader._is_hip = True, False
    loader.should_deepgemm_weight_requant_ue8m0 = lambda weight_block_size, output_dtype=None, weight_shape=None: False
    forward._ENABLE_DSA_Q8KV8_BORN_FP8_Q = False
    context.lora = types.SimpleNamespace(enable_lora=None, lora_paths=None, lora_target_modules=None)
    context.model = types.SimpleNamespace(weight_cache_mode="off")
    context.get_lora, context.get_model = (lambda: context.lora), (lambda: context.model)
    offloader.instance = type("NoopOffloader", (), {})()
    offloader.get_offloader = lambda: offloader.instance
    hooks.HookRegistry, hooks.HookType = _registry(), HookType
    monkeypatch.setattr(plugin, "DEVICES", ("cuda", "cpu"))
    plugin.register()
    hooks.HookRegistry.apply_hooks()
    return Engine(
        loader=loader, forward=forward, context=context, offloader=offloader, registry=hooks.HookRegistry,
        mixin=loader.DeepseekV2WeightLoaderMixin,
    )  # fmt: skip
