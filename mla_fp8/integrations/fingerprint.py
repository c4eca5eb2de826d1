"""Whether a module may compute something else than when it was last looked at."""

import weakref
from typing import Any

from torch import Tensor, nn

from mla_fp8.integrations import projection


class Fingerprint:
    """Tells whether what a module computes may have changed since, for microseconds and without a look at values.

    Parameters are compared by identity, address and torch's count of writes. Writes through `.data`, and to tensors
    made under torch.inference_mode(), are not counted.
    """

    def __init__(self, module: Any = None) -> None:
        self.module = None if module is None else weakref.ref(module)
        self.settings = None if module is None else _settings(module)
        self.places: list[tuple[dict[str, Any], str, Any, tuple[int, int]]] = []
        if module is not None and not projection.is_offloaded(module):  # else each forward puts new ones there
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
    """Address and count of writes; of a DTensor the address of its part, and the writes to either."""
    if tensor is None:
        return 0, 0
    writes = 0 if tensor.is_inference() else tensor._version
    if type(tensor) not in (nn.Parameter, Tensor) and projection.is_dtensor(tensor):
        tensor = projection.local(tensor)
        writes += 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), writes


def _settings(module: Any) -> tuple[Any, ...]:
    """What else decides: whether offloaded, and which of PEFT's adapters or modules_to_save are in use."""
    offloaded = projection.is_offloaded(module)
    if not module._modules or not projection.is_switched(module):
        return (offloaded,)
    if not projection.is_adapted(module):
        return offloaded, module.disable_adapters, tuple(module.active_adapters)
    scaling = getattr(module, "scaling", None)
    scales = tuple(scaling.items()) if isinstance(scaling, dict) else scaling
    return offloaded, module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters), scales
