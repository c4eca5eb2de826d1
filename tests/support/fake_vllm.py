"""A stand-in for the `vllm` package: what the plugin touches of 0.26.0, in its shapes and in its order of calls.

`load` and `reload` are the steps of its loader: each projection's quant_method, then each attention layer. A layer's
`absorb` and `_v_up_proj` are its two products as `forward_impl` has them.
"""

import sys
import types

import torch
from helpers import assert_same_bits, randn
from torch import Tensor, nn

from mla_fp8 import BlockFp8Weight
from mla_fp8.formats import E4M3, GROUP, dequantize_blocks
from mla_fp8.integrations import vllm as plugin
from mla_fp8.integrations.vllm_engine import CONFIG, MODULE, NAMES
from mla_fp8.integrations.vllm_weights import Run

HEADS, RANK = 2, 512  # num_heads of a rank, kv_lora_rank
Parts = tuple[Tensor, Tensor]


def parts(rng, heads=HEADS, nope=128, v_dim=128, power_of_two=False) -> Parts:
    """kv_b_proj's weight [H*(D+V), R] in e4m3 and its scales, one a 128x128 block."""
    rows = heads * (nope + v_dim)
    weight = (randn(rng, rows, RANK) * 80).clamp(-448, 448).to(E4M3)
    scale = (torch.rand(-(-rows // GROUP), RANK // GROUP, generator=rng) + 0.5) * 1e-3
    return weight, scale.log2().ceil().exp2() if power_of_two else scale


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scaled_dequantize`, of any number of rows."""
    scale = scale.repeat_interleave(GROUP, 0)[: weight.shape[0]].repeat_interleave(GROUP, 1)
    return (weight.float() * scale).to(dtype)


class BlockMethod:
    """Fp8LinearMethod; `to_powers_of_two` does what vLLM does for DeepGEMM."""

    def __init__(self, to_powers_of_two: bool = False) -> None:
        self.to_powers_of_two = to_powers_of_two

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if self.to_powers_of_two:
            scale = layer.weight_scale_inv.log2().ceil().exp2()
            wide = dequantized(layer.weight, layer.weight_scale_inv, torch.float32)
            ones = torch.ones_like(layer.weight, dtype=torch.float32)
            replace_parameter(layer, "weight", (wide / dequantized(ones, scale, torch.float32)).to(E4M3))
            replace_parameter(layer, "weight_scale_inv", scale)

    def dequantize(self, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        scale = getattr(layer, "weight_scale_inv", None)
        return dequantized(layer.weight, layer.weight_scale if scale is None else scale, dtype)


class PlainMethod:
    """Any other: weights of 16 bits, or those whose `wide` is known otherwise."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing to do."""

    def dequantize(self, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        return (layer.wide if hasattr(layer, "wide") else layer.weight).to(dtype)


class Projection(nn.Module):
    """ColumnParallelLinear, with parameters of these names."""

    def __init__(self, quant_method: object, **parameters: Tensor) -> None:
        super().__init__()
        self.quant_method = quant_method
        for name, tensor in parameters.items():
            setattr(self, name, nn.Parameter(tensor.clone(), requires_grad=False))


def projection(rng, method=None, name="weight_scale_inv", **options) -> Projection:
    """One in FP8 blocks, of random numbers."""
    weight, scale = parts(rng, **options)
    return Projection(method or BlockMethod(), weight=weight, **{name: scale})


def replace_parameter(layer: nn.Module, name: str, new: Tensor, prefer_copy: bool = False) -> None:
    old = getattr(layer, name, None)
    same = old is not None and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    if prefer_copy and same:
        old.copy_(new)
        return
    setattr(layer, name, nn.Parameter(new, requires_grad=False))


def make_class() -> type[nn.Module]:
    class MLAAttention(nn.Module):
        def __init__(
            self,
            num_heads: int,
            scale: float,
            qk_nope_head_dim: int,
            qk_rope_head_dim: int,
            v_head_dim: int,
            q_lora_rank: int | None,
            kv_lora_rank: int,
            kv_b_proj: nn.Module,
            q_pad_num_heads: int | None = None,
            **attributes: object,
        ) -> None:
            super().__init__()
            self.num_heads = num_heads
            self.qk_nope_head_dim = qk_nope_head_dim
            self.v_head_dim = v_head_dim
            self.kv_lora_rank = kv_lora_rank
            self.kv_b_proj = kv_b_proj
            self.q_pad_num_heads = q_pad_num_heads
            self.__dict__.update(attributes)

        def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
            wide = self.kv_b_proj.quant_method.dequantize(self.kv_b_proj, act_dtype).T
            heads = wide.view(self.kv_lora_rank, self.num_heads, self.qk_nope_head_dim + self.v_head_dim)
            w_uk, w_uv = heads.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
            replace_parameter(self, "W_UV", w_uv.transpose(0, 1), prefer_copy=True)
            self.between()
            replace_parameter(self, "W_UK_T", w_uk.permute(1, 2, 0), prefer_copy=True)

        def between(self) -> None:
            """For tests to break off."""

        def absorb(self, q_nope: Tensor) -> Tensor:
            """q_nope [S,H,D] -> [S,H,R], through a head-major buffer, which may have room for more heads."""
            q_nope = q_nope.transpose(0, 1)
            heads, tokens, _ = q_nope.shape
            _, _, rank = self.W_UK_T.shape
            out = q_nope.new_empty((self.q_pad_num_heads or heads, tokens, rank))
            out.resize_((heads, tokens, rank))
            torch.bmm(q_nope, self.W_UK_T, out=out)
            return out.transpose(0, 1)

        def _v_up_proj(self, x: Tensor, out: Tensor) -> None:
            x = x.view(-1, self.num_heads, self.kv_lora_rank).transpose(0, 1)
            out = out.view(-1, self.num_heads, self.v_head_dim)
            torch.bmm(x, self.W_UV, out=out.transpose(0, 1))

    return MLAAttention


def make_v32(attention: type[nn.Module]) -> type[nn.Module]:
    class DeepseekV32Attention(attention):  # type: ignore[misc, valid-type]
        def __init__(self, **options: object) -> None:
            super().__init__(**options)
            self.indexer = None

        def absorb(self, q_nope: Tensor) -> Tensor:
            return torch.bmm(q_nope.transpose(0, 1), self.W_UK_T).transpose(0, 1)

    return DeepseekV32Attention


def install(monkeypatch, attention: object = None) -> types.SimpleNamespace:
    """Make `vllm` importable; returns the attention class, and a `config` that tests may set."""
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in sorted({".".join(n.split(".")[: i + 1]) for n in (MODULE, CONFIG) for i in range(n.count(".") + 1)}):
        package = types.ModuleType(name)
        package.__path__ = []  # a package in which nothing can be found
        monkeypatch.setitem(sys.modules, name, package)
    fake = types.SimpleNamespace(attention=attention or make_class(), config=None)
    sys.modules[MODULE].MLAAttention = fake.attention
    sys.modules[CONFIG].get_current_vllm_config_or_none = lambda: fake.config
    return fake


def forget(monkeypatch) -> None:
    """As in a process in which the plugin has seen nothing, without its switch."""
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    monkeypatch.setattr(plugin, "run", Run(0))


def install_with_plugin(monkeypatch, switch: str = "1", attention: object = None) -> types.SimpleNamespace:
    monkeypatch.setenv(plugin.SWITCH, switch)
    fake = install(monkeypatch, attention)
    plugin.register()
    return fake


def layer(attention, projection: nn.Module, heads=HEADS, nope=128, v_dim=128, **attributes):
    return attention(
        num_heads=heads,
        scale=1.0,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=64,
        v_head_dim=v_dim,
        q_lora_rank=None,
        kv_lora_rank=RANK,
        kv_b_proj=projection,
        **attributes,
    )


def load(*layers: nn.Module, dtype=torch.bfloat16) -> None:
    """`process_weights_after_loading` of a model of these layers."""
    for each in layers:
        each.kv_b_proj.quant_method.process_weights_after_loading(each.kv_b_proj)
    for each in layers:
        each.process_weights_after_loading(dtype)


def place(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name in list(module._parameters):
        delattr(module, name)
    for name, tensor in tensors.items():
        module.register_parameter(name, tensor)


def reload(each: nn.Module, loaded: dict[str, Tensor], dtype=torch.bfloat16) -> None:
    """Layerwise, as `finalize_layerwise_reload`: tensors of before stay, and take the new numbers.

    Nothing loaded is a checkpoint without this projection: its tensors are put back, and the attention layer's step
    follows all the same.
    """
    projection = each.kv_b_proj
    old, mine = dict(projection._parameters), dict(each._parameters)
    place(each, {})
    if loaded:
        place(projection, {name: nn.Parameter(tensor.clone(), False) for name, tensor in loaded.items()})
        projection.quant_method.process_weights_after_loading(projection)
        for name, tensor in old.items():
            tensor.data.copy_(getattr(projection, name))
    place(projection, old)
    place(each, mine)
    each.process_weights_after_loading(dtype)


def exact(weight: Tensor, scale: Tensor, heads=HEADS, nope=128) -> Parts:
    """W_UK [H,D,R] and W_UV [H,R,V] in fp64."""
    cut = dequantize_blocks(weight[None], scale[None])[0].view(heads, -1, RANK)
    return cut[:, :nope], cut[:, nope:].mT


def runs_fp8(layer: nn.Module) -> bool:
    return all(type(getattr(layer, name)) is BlockFp8Weight and name not in layer._parameters for name in NAMES)


def is_stock(layer: nn.Module) -> bool:
    return all(type(layer._parameters.get(n)) is nn.Parameter and n not in vars(layer) for n in NAMES)


def assert_holds(layer: nn.Module, weight: Tensor, scale: Tensor) -> None:
    """Both weights hold the numbers of these blocks, every bit."""
    for name, want in zip(NAMES, exact(weight, scale), strict=True):
        assert_same_bits(getattr(layer, name).dequantize(torch.float64).float(), want.float(), name)
