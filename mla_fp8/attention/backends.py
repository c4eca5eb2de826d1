"""Libraries that attend over latents on a GPU, where they are installed: what each takes, its plan, and its run.

A library plans for a Call, its extents and the caches' layout; a model's layers share the plan of a step. Both read the
latents once for all heads, where PyTorch writes and reads logits besides.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mla_fp8 import devices

LATENT, ROPE = 512, 64  # the one pair of extents that both are built for
WIDTH = LATENT + ROPE
PAGE = 64  # tokens; the one page size of FlashMLA's dense kernel
ALIGN_BYTES = 16
FLASHINFER_WORKSPACE_BYTES = 128 << 20  # what its documentation recommends
PACKAGES = {"flash_mla": "sgl-flash-mla", "flashinfer": "flashinfer-python"}  # on PyPI
MODULES = {"flash_mla": "flash_mla", "flashinfer": "flashinfer.mla"}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B,S,H,R+P], kv_latent, k_pe -> o_latent [B,S,H,R]


@dataclass(frozen=True)
class Call:
    """All that a plan depends on."""

    batch: int
    queries: int  # of a sequence
    heads: int
    tokens: int
    rows: int  # from a sequence to the next in the caches; of a single sequence, its tokens
    scale: float
    dtype: torch.dtype
    device: torch.device


class NotInstalled(ImportError):
    pass


def load(name: str) -> Any:
    """The library's module. Raises NotInstalled, or what importing it raises."""
    try:
        return importlib.import_module(MODULES[name])
    except ModuleNotFoundError as error:
        raise NotInstalled(f"{error}; it comes with {PACKAGES[name]}") from None


@functools.cache  # a module that is missing is looked for once
def problem(name: str) -> str | None:
    """Why the library cannot be imported, if it cannot."""
    try:
        load(name)
    except Exception as error:  # whatever importing a library throws
        return str(error) if isinstance(error, NotInstalled) else f"{type(error).__name__}: {error}"
    return None


def call_of(q: Tensor, kv_latent: Tensor, k_pe: Tensor, mask: Tensor | None, scale: float) -> Call:
    """Raises ValueError with the first rule of all libraries that the inputs break."""
    reason = _broken_rule(q, kv_latent, k_pe, mask)
    if reason is not None:
        raise ValueError(reason)
    (batch, queries, heads, _), tokens = q.shape, kv_latent.shape[1]
    rows = {tokens} if batch == 1 else {_rows(kv_latent), _rows(k_pe)}
    if len(rows) > 1 or None in rows:
        raise ValueError("a sequence of kv_latent and of k_pe must begin a whole number of rows after the one before")
    return Call(batch, queries, heads, tokens, rows.pop() or tokens, scale, q.dtype, q.device)


def _broken_rule(q: Tensor, kv_latent: Tensor, k_pe: Tensor, mask: Tensor | None) -> str | None:
    tensors = q, kv_latent, k_pe
    if not all(type(x) is Tensor for x in tensors):
        return "the inputs must be plain tensors"
    if not on_hopper(q):
        return f"q must be on a GPU of compute capability {' or '.join(map(devices.text, devices.ATTENTION_LIBRARIES))}"
    rules = {
        "the stream must not be capturing a CUDA graph": not _is_capturing(q),
        "q must be torch.bfloat16": q.dtype == torch.bfloat16,
        f"R and P must be {LATENT} and {ROPE}": (kv_latent.shape[2], k_pe.shape[2]) == (LATENT, ROPE),
        "mask must be None": mask is None,
        "there must be queries and tokens": q.numel() > 0 and kv_latent.numel() > 0,
        "no input may need a gradient": not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)),
        "the last strides must be 1": all(x.stride(-1) == 1 for x in tensors),
        f"addresses and strides must be multiples of {ALIGN_BYTES} bytes": all(_is_aligned(x) for x in tensors),
    }
    return next((rule for rule, holds in rules.items() if not holds), None)


def on_hopper(tensor: Tensor) -> bool:
    return tensor.is_cuda and devices.has_attention_libraries(tensor.device)


def _is_capturing(q: Tensor) -> bool:
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_aligned(tensor: Tensor) -> bool:
    size = tensor.element_size()
    return all(value % ALIGN_BYTES == 0 for value in (tensor.data_ptr(), *(size * s for s in tensor.stride()[:-1])))


def _rows(cache: Tensor) -> int | None:
    to_sequence, to_row, _ = cache.stride()
    return to_sequence // to_row if to_row > 0 and to_sequence % to_row == 0 else None


def rows_of(cache: Tensor, call: Call) -> Tensor:
    """[B, T, C] as the rows [N, C] that it lies among; those between two sequences are never read."""
    step = cache.stride(1)
    return cache.as_strided(((call.batch - 1) * call.rows + call.tokens, cache.shape[2]), (step, 1))


def pages_of(kv_latent: Tensor, k_pe: Tensor, call: Call) -> Tensor:
    """Both caches as one [N, 64, 1, 576], without a copy. Raises ValueError where they do not lie like that."""
    together = k_pe.data_ptr() == kv_latent.data_ptr() + LATENT * kv_latent.element_size()
    if not together or kv_latent.stride(1) != WIDTH or k_pe.stride(1) != WIDTH:
        raise ValueError("kv_latent and k_pe must be views of one cache [B, T, 576]")
    if call.batch > 1 and call.rows % PAGE:
        raise ValueError(
            f"a cache of several sequences must have room for a multiple of {PAGE} tokens, got {call.rows}"
        )
    count = math.ceil(((call.batch - 1) * call.rows + call.tokens) / PAGE)
    end = (kv_latent.storage_offset() + count * PAGE * WIDTH) * kv_latent.element_size()
    if end > kv_latent.untyped_storage().nbytes():
        raise ValueError(f"the cache must have room for a multiple of {PAGE} tokens, got {call.tokens}")
    return kv_latent.as_strided((count, PAGE, 1, WIDTH), (PAGE * WIDTH, WIDTH, WIDTH, 1))


def why_not(name: str, call: Call, kv_latent: Tensor, k_pe: Tensor) -> str | None:
    """The reason for which one library cannot run a call, if there is one."""
    try:
        if name == "flash_mla":
            pages_of(kv_latent, k_pe, call)
    except ValueError as error:
        return str(error)
    return problem(name)


def flash_mla(device: torch.device) -> Callable[[Call], Attend]:
    """Dense decoding. sgl-flash-mla keeps it behind use_legacy; other releases have no such argument."""
    library = load("flash_mla")
    decode = library.flash_mla_with_kvcache
    options = {"use_legacy": True} if "use_legacy" in inspect.signature(decode).parameters else {}

    def plan(call: Call) -> Attend:
        first = torch.arange(call.batch, dtype=torch.int32, device=device) * (call.rows // PAGE)
        pages = torch.arange(math.ceil(call.tokens / PAGE), dtype=torch.int32, device=device)
        block_table = first[:, None] + pages
        lengths = torch.full((call.batch,), call.tokens, dtype=torch.int32, device=device)
        # Older releases schedule here, from lengths, rows of q a KV head, and KV heads; later ones in the first call.
        schedule, splits = library.get_mla_metadata(lengths, call.queries * call.heads, 1)

        def attend(q: Tensor, kv_latent: Tensor, k_pe: Tensor) -> Tensor:
            paged = pages_of(kv_latent, k_pe, call)
            arguments = q.contiguous(), paged, block_table, lengths, LATENT, schedule, splits
            o_latent: Tensor = decode(*arguments, softmax_scale=call.scale, **options)[0]
            return o_latent

        return attend

    return plan


def flashinfer(device: torch.device) -> Callable[[Call], Attend]:
    """Pages of one token, so that a cache may have any length. Compiles its kernel at the first plan."""
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = load("flashinfer").BatchMLAPagedAttentionWrapper(workspace)

    def plan(call: Call) -> Attend:
        sequences = torch.arange(call.batch + 1, dtype=torch.int32, device=device)
        rows = (
            sequences[:-1, None] * call.rows + torch.arange(call.tokens, dtype=torch.int32, device=device)
        ).flatten()
        lengths = torch.full((call.batch,), call.tokens, dtype=torch.int32, device=device)
        page, causal = 1, False
        wrapper.plan(
            *(sequences * call.queries, sequences * call.tokens, rows, lengths),
            *(call.heads, LATENT, ROPE, page, causal, call.scale, call.dtype, call.dtype),
        )

        def attend(q: Tensor, kv_latent: Tensor, k_pe: Tensor) -> Tensor:
            caches = (rows_of(cache, call).unsqueeze(1) for cache in (kv_latent, k_pe))
            o_latent: Tensor = wrapper.run(*q.flatten(0, 1).split([LATENT, ROPE], dim=-1), *caches)
            return o_latent.unflatten(0, q.shape[:2])

        return attend

    return plan


PLANNERS: dict[str, Callable[[torch.device], Callable[[Call], Attend]]] = {
    "flash_mla": flash_mla,
    "flashinfer": flashinfer,
}


class Planned:
    """A library on one stream: its plan is remade when a call differs from the one before."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._plan = PLANNERS[name](device)
        self._call: Call | None = None
        self._attend: Attend | None = None

    def attend(self, call: Call, q: Tensor, kv_latent: Tensor, k_pe: Tensor) -> Tensor:
        if self._attend is None or call != self._call:
            self._attend, self._call = self._plan(call), call
        return self._attend(q, kv_latent, k_pe)


@functools.lru_cache(maxsize=8)  # a FlashInfer workspace is 128 MiB
def planned(name: str, device: torch.device, stream: int) -> Planned:
    """The library as the stream uses it."""
    return Planned(name, device)


def stream_of(q: Tensor) -> int:
    return torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
