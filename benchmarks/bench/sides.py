"""The products that the GPU benchmark compares, what contenders read and write, the right result.

No implementation of a side can avoid its bytes: activations once, FP8 weights with their scales
once, the output once. Every rate in the tables counts these, also for contenders that move more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mla_fp8 import reference
from mla_fp8.config import Problem, problem_for
from mla_fp8.formats import E4M3, FP8_MAX, GROUP

BF16, FP32 = torch.bfloat16, torch.float32
ROPE_DIM = 64
L2_MULTIPLE = 3  # of what the buffer sets of one case hold together
M_ALIGNMENT = 256  # of the published masked GEMM
SAMPLED_TOKENS = 64  # that are compared with the reference; all elements are checked for having been written


@dataclass(frozen=True)
class Side:
    """One product: [S,H,k] x [H,n,k]ᵀ -> [S,H,n + rope]."""

    name: str
    op: str  # ours that makes it
    label: str  # in rows of tables
    title: str  # over a plot
    k: int
    n: int
    rope: int = 0
    in_bytes: float = 2  # an activation element; 1 + 4/128 where it comes quantized
    out_bytes: int = 2
    scale_bytes: int = 0  # a (token, head) of the output

    def read_bytes(self, s: int, heads: int) -> int:
        return int(s * heads * (self.k * self.in_bytes + self.rope * 2))

    def weight_bytes(self, heads: int) -> int:
        return heads * (self.n * self.k + 4 * (self.n // GROUP) * (self.k // GROUP))

    def written_bytes(self, s: int, heads: int) -> int:
        return s * heads * ((self.n + self.rope) * self.out_bytes + self.scale_bytes)

    def flops(self, s: int, heads: int) -> int:
        return 2 * s * heads * self.n * self.k

    def bytes(self, s: int, heads: int) -> int:
        return self.read_bytes(s, heads) + self.weight_bytes(heads) + self.written_bytes(s, heads)

    def problem(self, s: int, heads: int, activations: str = "exact") -> Problem:
        """What select_config is asked for it."""
        out_dtype = "float8_e4m3fn" if self.out_bytes == 1 else "bfloat16"
        extents = {"n": self.n, "k": self.k, "pe": self.rope}
        return problem_for(self.op, s, heads, **extents, activations=activations, out_dtype=out_dtype)


# fmt: off
_SIDES = (
    Side("front512", "absorb_q", "absorb_q, [S,H,512] bf16", "q_nope [S,H,128] -> q latent [S,H,512] bf16", 128, 512),
    Side("front576", "absorb_q", "absorb_q with q_pe, [S,H,576] bf16",
         "q_nope, q_pe -> q [S,H,576] bf16", 128, 512, ROPE_DIM),
    Side("front576_fp8", "absorb_q", "absorb_q with q_pe, [S,H,576] e4m3",
         "q_nope, q_pe -> q [S,H,576] e4m3, static scale", 128, 512, ROPE_DIM, out_bytes=1),
    Side("back", "v_up", "v_up, [S,H,128] bf16", "o_latent [S,H,512] -> v [S,H,128] bf16", 512, 128),
    Side("back_fp8", "v_up_quantized", "v_up_quantized, [S,H*128] e4m3",
         "o_latent -> v [S,H*128] e4m3, scales [S,H]", 512, 128, out_bytes=1, scale_bytes=4),
    Side("gemm", "bmm", "bmm, [H,S,512] bf16",
         "q_val, q_scale -> q latent [H,S,512] bf16, product alone", 128, 512, in_bytes=1 + 4 / GROUP),
)
# fmt: on
SIDES = {side.name: side for side in _SIDES}
GROUPS = {"front": ["front512", "front576", "front576_fp8"], "back": ["back", "back_fp8"], "all": list(SIDES)}


def rotation(footprint_bytes: int, l2_bytes: int) -> int:
    """Buffer sets that together exceed L2 L2_MULTIPLE times; one, where it does so alone."""
    return max(1, math.ceil(L2_MULTIPLE * l2_bytes / footprint_bytes))


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def words(tensor: Tensor) -> Tensor:
    """The tensor's memory as 4-byte words, for what only moves it."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    return flat[: flat.numel() // 4 * 4].view(torch.int32)


class Buffers:
    """A set of tensors, each made when it is first used. The sets of a case share their scratch."""

    def __init__(
        self, side: Side, s: int, heads: int, scratch: dict[str, Tensor], seed: int, device: str = "cuda"
    ) -> None:
        self.side, self.s, self.heads, self.device = side, s, heads, device
        self.m = round_up(s, M_ALIGNMENT)
        self._scratch = scratch
        self._made: dict[str, Any] = {}
        self._random = torch.Generator(device=device).manual_seed(seed)

    def make(self, role: str, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        """Activations (x), e4m3 weights (w), their scales, or what is written (out)."""
        if role == "out":
            return torch.empty(shape, dtype=dtype, device=self.device)
        if role == "scale":
            return (torch.rand(shape, device=self.device, generator=self._random) + 0.5) * 2**-11
        values = torch.randn(shape, dtype=FP32 if role == "w" else BF16, device=self.device, generator=self._random)
        return (values * (FP8_MAX / 4)).clamp(-FP8_MAX, FP8_MAX).to(E4M3) if role == "w" else values

    @cached_property
    def x_full(self) -> Tensor:
        """q [S,H,192] in front, o_latent [S,H,512] behind attention."""
        return self.make("x", self.s, self.heads, self.side.k + ROPE_DIM * (self.side.k == GROUP))

    @property
    def x(self) -> Tensor:
        return self.x_full[..., : self.side.k]

    @property
    def pe(self) -> Tensor | None:
        return self.x_full[..., self.side.k :] if self.side.rope else None

    @cached_property
    def w(self) -> Tensor:
        """[H,n,k] e4m3; W_UV is a view of the checkpoint, whose heads hold W_UK as well."""
        rows = self.side.n if self.side.k == GROUP else 2 * self.side.n
        return self.make("w", self.heads, rows, self.side.k, dtype=E4M3)[:, rows - self.side.n :]

    @cached_property
    def w_scale(self) -> Tensor:
        return self.make("scale", self.heads, self.side.n // GROUP, self.side.k // GROUP, dtype=FP32)

    @cached_property
    def w_exact(self) -> Tensor:
        return reference.dequantize_blocks(self.w, self.w_scale)

    @cached_property
    def w_bf16(self) -> Tensor:
        """[H,n,k], k contiguous."""
        return self.w_exact.bfloat16()

    @cached_property
    def w_bf16_t(self) -> Tensor:
        """[H,k,n], n contiguous."""
        return self.w_exact.mT.bfloat16().contiguous()

    @cached_property
    def w_tensor(self) -> tuple[Tensor, Tensor]:
        """The weights requantized with one scale: [H,n,k] e4m3 and fp32 [1]."""
        scale = (self.w_exact.abs().amax() / FP8_MAX).float().reshape(1)
        return reference.to_fp8(self.w_exact, scale), scale

    @cached_property
    def quantized(self) -> tuple[Tensor, Tensor]:
        return reference.quantize_q_nope(self.x, M_ALIGNMENT)

    @cached_property
    def static_scale(self) -> Tensor:
        """Of a whole tensor: the activations, or the output, whose largest columns are q_pe's."""
        return (self.x_full.abs().amax().float() / FP8_MAX).reshape(1)

    @cached_property
    def out(self) -> Tensor:
        """[S,H,n+rope], what the next kernel reads; for the product alone [H,S,n] in memory."""
        if self.side.name == "gemm":
            return self.out_hs.transpose(0, 1)
        dtype = BF16 if self.side.out_bytes == 2 else E4M3
        return self.make("out", self.s, self.heads, self.side.n + self.side.rope, dtype=dtype)

    @cached_property
    def out_hs(self) -> Tensor:
        """[H,S,n] bf16: torch.bmm's own layout, where it is the result."""
        return self.make("out", self.heads, self.s, self.side.n)

    @cached_property
    def masked(self) -> Tensor:
        """[H,M,n] bf16: the padded result of a masked grouped GEMM."""
        return self.make("out", self.heads, self.m, self.side.n)

    @cached_property
    def out_group_scale(self) -> Tensor:
        """[S,H] fp32 with strides (1, S rounded up to 4)."""
        return self.make("out", self.heads, round_up(self.s, 4), dtype=FP32).mT[: self.s]

    @cached_property
    def moved(self) -> Tensor:
        """What the floor writes: the output's and its scales' bytes, as words."""
        return self.make("out", self.side.written_bytes(self.s, self.heads) // 4, dtype=torch.int32)

    @cached_property
    def masked_inputs(self) -> tuple[Tensor, Tensor]:
        """A masked GEMM's weights, for it takes no view, and how many rows of a head are tokens."""
        return self.w.contiguous(), torch.full((self.heads,), self.s, dtype=torch.int32, device=self.device)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = BF16) -> Tensor:
        if name not in self._scratch:
            self._scratch[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return self._scratch[name]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What a library makes of this set's weights before its first launch, which no clock sees."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def result(self, layout: str) -> Tensor:
        """[S,H,n+rope] whatever the layout that a contender wrote."""
        if layout == "out":
            return self.out
        return (self.out_hs if layout == "out_hs" else self.masked[:, : self.s]).transpose(0, 1)

    def poison(self, layout: str) -> None:
        """Every byte 0xFF: NaN in bf16 and e4m3."""
        self.result(layout).view(torch.uint8).fill_(255)
        self.out_group_scale.fill_(math.nan)

    def sample(self) -> Tensor:
        return torch.linspace(0, self.s - 1, min(self.s, SAMPLED_TOKENS), device=self.device).long().unique()

    def decode(self, layout: str) -> Tensor:
        """The sampled tokens of a result in fp64; NaN if anything anywhere was left unwritten."""
        result, tokens = self.result(layout), self.sample()
        value = result[tokens].double()
        if any(bool(piece.float().isnan().any()) for piece in result.split(1024)):  # outputs are large
            return torch.full_like(value, math.nan)
        if self.side.scale_bytes:
            return value * self.out_group_scale[tokens].double().unsqueeze(-1)
        return value * (self.static_scale.double() if result.dtype == E4M3 else 1)

    def exact(self) -> Tensor:
        """The sampled tokens with unquantized activations, in fp64."""
        tokens = self.sample()
        product = torch.einsum("shk,hnk->shn", self.x[tokens].double(), self.w_exact)
        return product if self.pe is None else torch.cat([product, self.pe[tokens].double()], dim=-1)

    def own_reference(self, activations: str = "exact") -> Tensor:
        """The sampled tokens as mla_fp8.reference makes them, with output rounding, in fp64."""
        tokens = self.sample()
        x, pe = self.x[tokens], None if self.pe is None else self.pe[tokens]
        if self.side.scale_bytes:
            val, scale = reference.v_up_quantized(x, self.w, self.w_scale, activations=activations)
            return val.view(*x.shape[:2], -1).double() * scale.double().unsqueeze(-1)
        out_scale = self.static_scale if self.side.out_bytes == 1 else None
        q = reference.absorb_q(x, self.w, self.w_scale, pe, out_scale, activations=activations).double()
        return q if out_scale is None else q * out_scale.double()
