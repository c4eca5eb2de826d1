"""One decode step's attention over cached latents, by whoever is installed.

Each backend plans for a shape and gives a function of the step's tensors: q [S,H,576] and cache [S,T,576], both bf16
and contiguous -> o_latent [S,H,512]. In pages of 64 tokens or in one piece, the cache is the same memory. FlashMLA's
schedule and FlashInfer's plan are made once, before any time is taken: a server shares one a step among all layers.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from peers import load
from sides import ROPE_DIM
from torch import Tensor

from mla_fp8.attention import attend_latents

LATENT, HEAD_DIM = 512, 128
WIDTH = LATENT + ROPE_DIM
SCALE = (HEAD_DIM + ROPE_DIM) ** -0.5
PAGE = 64  # tokens; the one page size of FlashMLA's dense kernel
FLASHINFER_WORKSPACE_BYTES = 128 << 20  # what its documentation recommends
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, cache, memory for o_latent that it may use -> o_latent


@dataclass(frozen=True)
class Shape:
    batch: int
    context: int
    heads: int
    device: str = "cuda"

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context}, H = {self.heads}"

    @property
    def cache_bytes(self) -> int:
        return self.batch * self.context * WIDTH * 2

    @property
    def bytes(self) -> int:
        """What attention cannot avoid: the cache and q once, o_latent once."""
        return self.cache_bytes + self.batch * self.heads * (WIDTH + LATENT) * 2


PACKAGES = {"sgl-flash-mla": "flash_mla", "flashinfer-python": "flashinfer.mla"}  # on PyPI, and their modules


class NotInstalled(Exception):
    pass


def required(package: str) -> Any:
    name = PACKAGES[package]
    module = load(name)
    if isinstance(module, ModuleType):
        return module
    if module.startswith("ModuleNotFoundError"):
        raise NotInstalled(f"{module}; it comes with {package}")
    raise ImportError(module)


def _split(cache: Tensor) -> tuple[Tensor, Tensor]:
    latent, rope = cache.split([LATENT, ROPE_DIM], dim=-1)
    return latent, rope


def pytorch(shape: Shape) -> Attend:
    return lambda q, cache, _: attend_latents(q.unsqueeze(1), *_split(cache), scale=SCALE)[:, 0]


_compiled = torch.compile(attend_latents, dynamic=True, fullgraph=True)


def compiled(shape: Shape) -> Attend:
    return lambda q, cache, _: _compiled(q.unsqueeze(1), *_split(cache), scale=SCALE)[:, 0]


def flash_mla(shape: Shape) -> Attend:
    """Dense bf16 decode. sgl-flash-mla keeps it behind use_legacy; other releases have no such argument."""
    library = required("sgl-flash-mla")
    decode = library.flash_mla_with_kvcache
    options = {"use_legacy": True} if "use_legacy" in inspect.signature(decode).parameters else {}
    pages = shape.context // PAGE
    block_table = torch.arange(shape.batch * pages, dtype=torch.int32, device=shape.device).view(shape.batch, pages)
    lengths = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=shape.device)
    # Older releases schedule here, from lengths, rows of q a KV head, and KV heads; later ones in the first call.
    schedule, splits = library.get_mla_metadata(lengths, shape.heads, 1)

    def attend(q: Tensor, cache: Tensor, _: Tensor) -> Tensor:
        paged = cache.view(-1, PAGE, 1, WIDTH)
        o_latent, _lse = decode(
            q.unsqueeze(1), paged, block_table, lengths, LATENT, schedule, splits, softmax_scale=SCALE, **options
        )
        return o_latent.squeeze(1)

    return attend


def flashinfer(shape: Shape) -> Attend:
    library, pages = required("flashinfer-python"), shape.context // PAGE
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=shape.device)
    wrapper = library.BatchMLAPagedAttentionWrapper(workspace)
    queries = torch.arange(shape.batch + 1, dtype=torch.int32, device=shape.device)  # where each one's rows of q begin
    indices = torch.arange(shape.batch * pages, dtype=torch.int32, device=shape.device)
    lengths = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=shape.device)
    dims = shape.heads, LATENT, ROPE_DIM, PAGE
    causal = False
    wrapper.plan(
        queries, queries * pages, indices, lengths, *dims, causal, SCALE, torch.bfloat16, torch.bfloat16
    )  # compiles its kernel where this release has none built

    def attend(q: Tensor, cache: Tensor, o_latent: Tensor) -> Tensor:
        paged = cache.view(-1, PAGE, WIDTH)
        wrapper.run(*_split(q), *_split(paged), out=o_latent)
        return o_latent

    return attend


BACKENDS: dict[str, tuple[str, Callable[[Shape], Attend]]] = {
    "torch": ("attend_latents", pytorch),
    "compiled": ("attend_latents, torch.compile", compiled),
    "flash_mla": ("FlashMLA", flash_mla),
    "flashinfer": ("FlashInfer", flashinfer),
}
