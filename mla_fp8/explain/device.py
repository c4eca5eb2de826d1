"""Whose limits and speeds `explain` models: those of the GPU that is here, or an H100's."""

import contextlib

import torch

from mla_fp8 import _native
from mla_fp8._config import Device

H100 = "an H100"


def device_limits(index: int = 0) -> Device:
    """Ask a GPU for the limits and speeds by which its calls choose their tiles.

    Args:
        index: of torch's CUDA devices, as in cuda:0.

    Returns:
        a Device; what a driver does not tell, as how long a launch takes, is an H100's.

    Raises:
        RuntimeError: no CUDA driver or one older than 12.0; a device index or compute capability that is not supported.

    Notes: makes no CUDA context.

    Source: docs/configuration.md.

    Example:
        >>> device_limits().num_sms if torch.cuda.is_available() else 132
        132
    """
    fields = dict(field.split("=") for field in _native.device(index).split())
    return Device(**{name: type(getattr(Device(), name))(float(value)) for name, value in fields.items()})


def modelled(device: Device | int | None) -> tuple[Device, str]:
    """The limits that `explain` takes for its `device`, and in words whose they are, where they are some GPU's."""
    if isinstance(device, Device):
        return device, H100 if device == Device() else ""
    if device is not None:
        return device_limits(device), f"cuda:{device}"
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # a GPU that the kernels do not run on
            return device_limits(index), f"this {torch.cuda.get_device_name(index)}"
    return Device(), f"{H100} (no supported GPU here)"
