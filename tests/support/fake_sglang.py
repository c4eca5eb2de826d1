"""A stand-in for the `sglang` package: the function that the plugin replaces, a caller of it, and a hook registry.

Written from what SGLang 0.5.23 documents and does. `masked_quantization` is its function's contract in plain PyTorch.
"""

import enum
import functools
import importlib
import sys
import types

import torch
from torch import Tensor

from mla_fp8.integrations.sglang import FUNCTION, HOOKS, MODULES

E4M3 = torch.float8_e4m3fn
CALLER = "sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla"
GEMM_TILE = 256  # rows are allocated to a multiple of the masked GEMM's largest tile
UNWRITTEN = 0x7F  # NaN: rows from S on hold whatever the allocator gives


def masked_quantization(x: Tensor, group_size: int = 128, eps: float = 1e-12, dtype: torch.dtype = E4M3):
    """[H,S,K] -> values [H,M,K], scales [H,M,K/group] with rows adjacent, S as int32 [H], S and M."""
    heads, rows, k = x.shape
    aligned = -(-rows // GEMM_TILE) * GEMM_TILE
    groups = x.float().unflatten(2, (k // group_size, group_size))
    # By tensors, as torch on CUDA turns a division by a number into a product.
    floor, largest = (torch.tensor(v, dtype=torch.float32, device=x.device) for v in (eps, torch.finfo(dtype).max))
    scale = torch.maximum(groups.abs().amax(3), floor) / largest
    val = (groups / scale.unsqueeze(3)).clamp(-largest, largest).to(dtype).flatten(2)
    x_val = torch.full((heads, aligned, k), UNWRITTEN, dtype=torch.uint8, device=x.device).view(dtype)
    x_val[:, :rows].view(torch.uint8).copy_(val.view(torch.uint8))
    by_group = torch.full((heads, k // group_size, aligned), float("nan"), device=x.device)
    by_group[:, :, :rows].copy_(scale.transpose(1, 2))
    counts = torch.full((heads,), rows, dtype=torch.int32, device=x.device)
    return x_val, by_group.transpose(1, 2), counts, rows, aligned


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
            """Wraps each target, and every name by which another module imported it."""
            for target, hook, hook_type in cls.hooks:
                assert hook_type is HookType.AROUND
                module, _, name = target.rpartition(".")
                original = getattr(importlib.import_module(module), name)
                wrapped = functools.wraps(original)(functools.partial(hook, original))
                for other in [m for name, m in sys.modules.items() if name.startswith("sglang")]:
                    for attribute, value in list(vars(other).items()):
                        if value is original:
                            setattr(other, attribute, wrapped)

    return HookRegistry


def install(monkeypatch, function=masked_quantization, module: str = MODULES[0], registry: bool = True):
    """Make `sglang` importable, with `function` in one module; returns the caller's module and the registry."""
    for name in [name for name in sys.modules if name == "sglang" or name.startswith("sglang.")]:
        monkeypatch.delitem(sys.modules, name)
    names = {module, CALLER} | ({HOOKS} if registry else set())
    for name in sorted({".".join(n.split(".")[: i + 1]) for n in names for i in range(n.count(".") + 1)}):
        package = types.ModuleType(name)
        package.__path__ = []  # a package in which nothing can be found
        monkeypatch.setitem(sys.modules, name, package)
    if function is not None:
        for name in (module, CALLER):
            setattr(sys.modules[name], FUNCTION, function)
    hook_registry = _registry()
    if registry:
        sys.modules[HOOKS].HookRegistry, sys.modules[HOOKS].HookType = hook_registry, HookType
    return sys.modules[CALLER], hook_registry
