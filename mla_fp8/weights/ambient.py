"""What a program may have switched on around a call, switched off for the length of one that reads or cuts weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """New tensors are normal ones, that hold numbers and may be written later: no inference mode, no autograd.

    Inside of torch.inference_mode a tensor would become one that no refit outside of it may write.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """As `plain_tensors`, and new tensors are on the CPU: no default device, FakeTensorMode or vmap around them."""
    with _disable_current_modes(), torch._C._DisableFuncTorch(), torch.device("cpu"), plain_tensors():
        yield
