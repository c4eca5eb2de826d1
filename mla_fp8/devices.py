"""What a GPU of a compute capability can do: the one place in Python that knows a number of one."""

import torch

HOPPER = (9, 0)
KERNELS = {HOPPER: "sm_90a"}  # the capabilities that the ops have kernels for -> NVRTC's name of the target
ATTENTION_LIBRARIES = (HOPPER,)  # those on which attention.backends asks FlashMLA and FlashInfer


def text(capability: tuple[int, ...]) -> str:
    """(9, 0) -> "9.0"."""
    return ".".join(map(str, capability))


def folder(capability: tuple[int, ...]) -> str:
    """(9, 0) -> "sm90", the folder of its kernels in csrc/kernels/."""
    return "sm" + "".join(map(str, capability))


TARGETS = {folder(capability): target for capability, target in KERNELS.items()}
SUPPORTED = " or ".join(map(text, KERNELS))


def why_not(capability: tuple[int, ...]) -> str | None:
    """The reason for which the ops do not run on such a GPU, if there is one."""
    return None if capability in KERNELS else f"compute capability must be {SUPPORTED}, got {text(capability)}"


def why_not_on(device: torch.device | int) -> str | None:
    """The same of one of torch's CUDA devices."""
    return why_not(torch.cuda.get_device_capability(device))


def has_attention_libraries(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) in ATTENTION_LIBRARIES
