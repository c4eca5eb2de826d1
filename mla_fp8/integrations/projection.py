"""What a model's kv_b_proj computes: its weight, wherever adapters, offloading and tensor parallelism keep it."""

import contextlib
import copy
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mla_fp8.formats import E4M3, GROUP, dequantize_blocks

SCALES = ("weight_scale_inv", "weight_scale")  # DeepSeek's name, and compressed-tensors' and ModelOpt's
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


def is_adapted(module: Any) -> bool:
    return hasattr(module, "merged_adapters") and hasattr(module, "get_base_layer")


def offload_hooks(module: nn.Module) -> list[nn.Module]:
    """The submodules whose weights accelerate keeps elsewhere."""
    hooks = ((part, vars(part).get("_hf_hook")) for part in module.modules())
    return [part for part, hook in hooks if hook is not None and getattr(hook, "offload", False)]


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
    found: Any = next((value for name in SCALES if (value := getattr(module, name, None)) is not None), None)
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
    rule = f"kv_b_proj ({type(module).__name__}) computes something else than its weight"
    return None if not off > COMPUTES_TOLERANCE else f"{rule}: off by {off:.2g}"


def same_numbers(source: Source, w_uk: Tensor, w_uv: Tensor) -> bool:
    """Whether W_UK [H, D, R] and W_UV [H, V, R] are what the source holds, as far as its dtype can tell."""
    weight, scale = source
    want = dequantize_blocks(weight[None], scale[None])[0] if scale is not None else weight
    held = torch.cat([w_uk, w_uv], dim=1).flatten(0, 1).to(want.device)
    finfo = torch.finfo(want.dtype)
    close = (want.float() - held).abs() <= held.abs() * finfo.eps + finfo.smallest_normal * finfo.eps
    return bool(close.all())


class Fingerprint:
    """Tells whether what a module computes may have changed since, for microseconds and without a look at values.

    Parameters are compared by identity, address and torch's count of writes. Writes through `.data`, and to tensors
    made under torch.inference_mode(), are not counted.
    """

    def __init__(self, module: Any = None) -> None:
        self.module = None if module is None else weakref.ref(module)
        self.settings = None if module is None else _settings(module)
        self.places: list[tuple[dict[str, Any], str, Any, tuple[int, int]]] = []
        if module is not None and not is_offloaded(module):  # else each forward puts new ones there
            owners = [group for part in module.modules() for group in (part._parameters, part._buffers)]
            self.places = [(owner, name, _ref(t), _state(t)) for owner in owners for name, t in owner.items()]

    def matches(self, module: Any) -> bool:
        if self.module is None or self.module() is not module or self.settings != _settings(module):
            return False
        for owner, name, ref, state in self.places:
            tensor = owner.get(name)
            if tensor is not ref() or (tensor is not None and _state(tensor) != state):
                return False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return Fingerprint, ()  # a copy's parameters are others


def _ref(tensor: Tensor | None) -> Any:
    return _none if tensor is None else weakref.ref(tensor)


def _none() -> None:
    return None


def _state(tensor: Any) -> tuple[int, int]:
    """Address and count of writes; of a DTensor those of its part."""
    if tensor is None:
        return 0, 0
    if type(tensor) not in (nn.Parameter, Tensor):
        tensor = local(tensor)
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def is_offloaded(module: Any) -> bool:
    if module._modules:
        return bool(offload_hooks(module))
    return "_hf_hook" in module.__dict__ and getattr(module._hf_hook, "offload", False)


def _settings(module: Any) -> tuple[Any, ...]:
    """What else decides: whether offloaded, and which adapters are in use."""
    if not module._modules:
        return (is_offloaded(module),)
    if not is_adapted(module):
        return is_offloaded(module), repr(getattr(module, "active_adapters", None))
    adapters = (module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters))
    return is_offloaded(module), *adapters, tuple(getattr(module, "scaling", {}).items())
