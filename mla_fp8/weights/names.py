"""A module's path is not its tensor's name: wrappers and model classes put other prefixes before the same layer."""

import difflib
import re
from collections.abc import Iterable, Iterator

NEAREST = 3  # names that a message lists
# What torch.compile, PEFT, FSDP and activation checkpointing put between a layer and its parts.
WITHIN = ("_orig_mod", "base_layer", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def find_kv_b_proj(names: Iterable[str], layer: int, wanted: str) -> str:
    """The name of `wanted` among a checkpoint's tensors, without its last part (`.weight`, `.weight_scale_inv`, ...).

    What follows `layers.N.` must be the same; prefixes may differ, as those of `AutoModel` (no "model."), torch.compile
    ("_orig_mod."), DDP ("module."), PEFT ("base_model.model.") and multimodal models ("language_model.") do. Of several
    the one that shares most parts with `wanted`, then the shortest.

    Args:
        names: of all tensors.
        layer: its index, for a `wanted` with {layer} in it.
        wanted: path of the module, such as "model.layers.3.self_attn.kv_b_proj".

    Returns: the name, before `.weight`.
    Raises: LookupError where there is none, or two that are as near; it lists the nearest names.
    """
    names = list(names)
    wanted = wanted.replace("{layer}", str(layer))
    modules = {name.rpartition(".")[0] for name in names}
    if wanted in modules:
        return wanted
    tail = _tail(wanted)
    ranked = sorted((_distance(module, wanted), module) for module in modules if tail and _tail(module) == tail)
    if ranked and (len(ranked) == 1 or ranked[0][0] < ranked[1][0]):
        return ranked[0][1]
    found = [module for _, module in ranked] or list(_nearest(names, wanted))
    nearest = ", ".join(found[:NEAREST]) or "no name like it"
    raise LookupError(f"{'several' if ranked else 'no'} {wanted}.weight; nearest: {nearest}")


def _tail(path: str) -> str:
    """From the last `layers.N.` on, or else from the first numbered part; "" without one."""
    path = ".".join(part for part in path.split(".") if part not in WITHIN)
    found = re.search(r"(?:^|.*\.)(layers\.\d+\..+)$", path) or re.search(r"(?:^|\.)(\w+\.\d+\..+)$", path)
    return found[1] if found else ""


def _distance(name: str, wanted: str) -> tuple[int, int]:
    have, want = name.split("."), wanted.split(".")
    shared = sum(min(have.count(part), want.count(part)) for part in set(want))
    return -shared, len(have)


def _nearest(names: list[str], wanted: str) -> Iterator[str]:
    """Those of the same kind first, else whatever is spelt alike."""
    last = wanted.rpartition(".")[2]
    same_kind = [name for name in names if f".{last}." in f".{name}."]
    yield from difflib.get_close_matches(f"{wanted}.weight", same_kind or names, NEAREST, cutoff=0.0)
