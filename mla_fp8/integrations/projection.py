"""What a model's kv_b_proj computes: its weight, wherever adapters, offloading and tensor parallelism keep it."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mla_fp8.formats import ACTIVATIONS, E4M3, GROUP, dequantize_blocks
from mla_fp8.weights.kv_b_proj import SCALE_NAMES, UNQUANTIZED

COMPUTES_TOLERANCE = 0.05  # 8-bit activations give 0.01 to 0.03, a dropped adapter or a wrong weight far more
PROBES = 4  # rows


class NotAbsorbed(ValueError):
    """What a module computes is not one weight; the text is the reason."""


class Source(NamedTuple):
    """kv_b_proj's rows of this rank, with all that the module does to them."""

    weight: Tensor  # [H*(D+V), R]
    weight_scale_inv: Tensor | None  # fp32, where weight is e4m3


def base(module: Any) -> Any:
    """The linear layer under PEFT's adapters."""
    return module.get_base_layer() if is_adapted(module) else module


def is_switched(module: Any) -> bool:
    """PEFT may switch what it computes without a write: an adapter's layer, or another weight (modules_to_save)."""
    return hasattr(module, "disable_adapters")


def is_adapted(module: Any) -> bool:
    return hasattr(module, "merged_adapters") and hasattr(module, "get_base_layer")


def offload_hooks(module: nn.Module) -> list[nn.Module]:
    """The submodules whose weights accelerate keeps elsewhere."""
    hooks = ((part, vars(part).get("_hf_hook")) for part in module.modules())
    return [part for part, hook in hooks if hook is not None and getattr(hook, "offload", False)]


def is_offloaded(module: Any) -> bool:
    if module._modules:
        return bool(offload_hooks(module))
    return "_hf_hook" in module.__dict__ and getattr(module._hf_hook, "offload", False)


@contextlib.contextmanager
def materialized(module: nn.Module) -> Iterator[None]:
    """For as long as it lasts, offloaded weights are on the device on which the module runs."""
    with contextlib.ExitStack() as stack:
        for part in offload_hooks(module):
            from accelerate.utils import align_module_device

            stack.enter_context(align_module_device(part))
        yield


def device_of(layer: nn.Module) -> torch.device:
    """Where the layer's kv_b_proj runs; the CPU where nothing says."""
    parts = [*layer.kv_b_proj.modules(), *layer.modules()]  # type: ignore[operator,union-attr]
    for part in parts:
        hook: Any = getattr(part, "_hf_hook", None)
        if getattr(hook, "offload", False) and hook.execution_device is not None:
            device = hook.execution_device
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    on = [t.device for part in parts for t in (*part._parameters.values(), *part._buffers.values()) if t is not None]
    return next((device for device in on if device.type != "meta"), torch.device("cpu"))


def is_dtensor(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and hasattr(tensor, "_local_tensor") and hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def share(tensor: Any) -> tuple[int, int]:
    """Rank and number of ranks that share the rows."""
    if is_dtensor(tensor):
        for dim, placement in enumerate(tensor.placements):
            if placement.is_shard():
                return tensor.device_mesh.get_local_rank(dim), tensor.device_mesh.size(dim)
    return 0, 1


def why_not_sharded(weight: Any) -> str | None:
    """The reason for which a DTensor does not hold whole heads of this rank."""
    if not is_dtensor(weight):
        return None
    by_rows = [type(p).__name__ == "Shard" and p.dim == 0 for p in weight.placements]
    split = [not p.is_replicate() for p in weight.placements]
    if by_rows != split or sum(split) > 1:
        return f"kv_b_proj.weight is a DTensor of {tuple(weight.placements)}, not one part of its rows a rank"
    _, size = share(weight)
    even = local(weight).shape[0] * size == weight.shape[0]
    return (
        None if even else f"kv_b_proj.weight is a DTensor of {weight.shape[0]} rows, which {size} ranks do not divide"
    )


def scale_of(module: Any, weight: Tensor) -> Tensor | None:
    """Scales of a module in FP8, one a block in fp32; None where it has no such."""
    found: Any = next((value for name in SCALE_NAMES if (value := getattr(module, name, None)) is not None), None)
    if found is None:
        return None
    blocks = [extent // GROUP for extent in weight.shape]
    scale = local(found).detach()
    scale = scale.float() if scale.dtype in (torch.bfloat16, torch.float16) else scale
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(blocks).contiguous()
    return scale if list(scale.shape) == blocks else None


def read(module: Any) -> Source:
    """What the module computes now."""
    with torch.no_grad(), materialized(module):
        if is_adapted(module):
            return Source(merged(module), None)
        weight = local(module.weight).detach()
        if weight.dtype != E4M3:
            return Source(weight, None)
        return Source(weight, scale_of(module, weight))


def merged(module: Any) -> Tensor:
    """The weight with the active adapters in it, in fp32: by the adapter's own merge, of a copy."""
    linear = base(module)
    if not linear.weight.is_floating_point() or linear.weight.dtype == E4M3:
        raise NotAbsorbed(f"kv_b_proj has an adapter on {linear.weight.dtype}")
    if module.disable_adapters and not module.merged:
        return linear.weight.detach().float()
    twin = copy.deepcopy(module).float()
    try:
        if module.disable_adapters:
            twin.unmerge()
        elif not module.merged:
            twin.merge()
    except Exception as error:  # each kind of adapter has its own reasons
        raise NotAbsorbed(f"kv_b_proj's adapter does not merge: {type(error).__name__}: {error}") from error
    if base(twin).bias is not None:
        raise NotAbsorbed("kv_b_proj's adapter has a bias")
    return base(twin).weight.detach()


def why_not_computed(module: Any, source: Source) -> str | None:
    """Run the module on a few rows: the reason for which it is no product with `source`, if it is none.

    Not asked of FP8 modules, whose kernels may have to be fetched, nor of DTensors, whose ranks would have to meet.
    """
    if source.weight_scale_inv is not None or is_dtensor(getattr(base(module), "weight", None)):
        return None
    rows, lora = PROBES, source.weight.shape[1]
    x = torch.arange(1, rows * lora + 1, device=source.weight.device, dtype=torch.float32).sin().view(rows, lora)
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.no_grad(), materialized(module):
            x = x.to(base(module).weight.dtype)
            got = module.eval()(x).float()
    except Exception as error:  # the module is a stranger
        return f"kv_b_proj cannot be run: {type(error).__name__}: {error}"
    finally:
        for part, training in modes.items():
            part.training = training
    want = x.float() @ source.weight.float().mT
    off = ((got - want).norm() / want.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()
    reason = f"kv_b_proj ({type(module).__name__}) computes something else than its weight"
    same = off <= COMPUTES_TOLERANCE or not want.isfinite().all()  # NaN in a weight is for others to say
    return None if same else reason


def same_numbers(source: Source, w_uk: Tensor, w_uv: Tensor) -> bool:
    """Whether W_UK [H, D, R] and W_UV [H, V, R] are what the source holds, rounded to its dtype at once or by bf16."""
    weight, scale = source
    want = dequantize_blocks(weight[None], scale[None])[0] if scale is not None else weight
    held = torch.cat([w_uk, w_uv], dim=1).flatten(0, 1).to(want.device)
    return any(torch.equal(held.to(by).to(want.dtype), want) for by in (want.dtype, torch.bfloat16, torch.float16))


def why_not_weight(layer: Any, weights: str) -> str | None:
    """The reason for which kv_b_proj's own weight cannot be absorbed, by what can be told without its values."""
    module = base(layer.kv_b_proj)
    if getattr(module, "bias", None) is not None:
        return "kv_b_proj has a bias"
    whole = getattr(module, "weight", None)
    if not isinstance(whole, Tensor):
        return f"kv_b_proj ({type(module).__name__}) has no .weight, but packed numbers"
    weight = local(whole)
    if weight.is_meta and not offload_hooks(layer.kv_b_proj):
        return "kv_b_proj.weight is on meta, without values"
    if type(weight.data) is not Tensor:
        return f"kv_b_proj.weight is no plain tensor, but {type(weight.data).__name__}"
    taken = UNQUANTIZED if weights == "unquantized" else (*ACTIVATIONS, E4M3)
    if weight.dtype not in taken:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in taken)
        return f"kv_b_proj.weight is {weight.dtype}; weights={weights!r} takes {names}"
    rows, lora = layer.qk_nope_head_dim + layer.v_head_dim, layer.kv_lora_rank
    if weight.dim() != 2 or weight.shape[1] != lora or weight.shape[0] % rows:
        return f"kv_b_proj.weight is {list(weight.shape)}, not [H * {rows}, {lora}]"
    if weight.dtype == E4M3 and scale_of(module, weight) is None:
        found = {n: list(t.shape) for n in SCALE_NAMES if (t := getattr(module, n, None)) is not None}
        return f"kv_b_proj is float8_e4m3fn without one scale a {GROUP}x{GROUP} block, but {found or 'none'}"
    return None
