"""One decode step's attention over cached latents, by whoever is installed.

Each backend plans for a shape and gives a function of the step's tensors: q [S,H,576] and cache [S,T,576], both bf16
and contiguous -> o_latent [S,H,512].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mla_fp8.attention import attend_latents
from mla_fp8.attention.backends import LATENT, PLANNERS, ROPE, WIDTH, Call

HEAD_DIM = 128
SCALE = (HEAD_DIM + ROPE) ** -0.5
Attend = Callable[[Tensor, Tensor], Tensor]


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


def _split(cache: Tensor) -> tuple[Tensor, Tensor]:
    latent, rope = cache.split([LATENT, ROPE], dim=-1)
    return latent, rope


def pytorch(shape: Shape) -> Attend:
    return lambda q, cache: attend_latents(q.unsqueeze(1), *_split(cache), scale=SCALE, backend="torch")[:, 0]


_compiled = torch.compile(attend_latents, dynamic=True, fullgraph=True)


def compiled(shape: Shape) -> Attend:
    return lambda q, cache: _compiled(q.unsqueeze(1), *_split(cache), scale=SCALE)[:, 0]


def library(name: str) -> Callable[[Shape], Attend]:
    """Planned once, before any time is taken: a server shares a step's plan among all layers."""

    def planned(shape: Shape) -> Attend:
        extents = shape.batch, 1, shape.heads, shape.context, shape.context
        call = Call(*extents, SCALE, torch.bfloat16, torch.device(shape.device))
        attend = PLANNERS[name](call.device)(call)
        return lambda q, cache: attend(q.unsqueeze(1), *_split(cache))[:, 0]

    return planned


BACKENDS: dict[str, tuple[str, Callable[[Shape], Attend]]] = {
    "torch": ("attend_latents", pytorch),
    "compiled": ("attend_latents, torch.compile", compiled),
    "flash_mla": ("FlashMLA", library("flash_mla")),
    "flashinfer": ("FlashInfer", library("flashinfer")),
}
