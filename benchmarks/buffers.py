"""What the contenders of the GPU benchmark read and write, and what the result has to be."""

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from sides import ROPE_DIM, Side
from torch import Tensor

from mla_fp8 import reference
from mla_fp8.formats import FP8_MAX, GROUP

E4M3, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
M_ALIGNMENT = 256  # of the published masked GEMM
SAMPLED_TOKENS = 64  # that are compared with the reference; all elements are checked for having been written


def ceil4(s: int) -> int:
    return -(-s // 4) * 4


def words(tensor: Tensor) -> Tensor:
    """The tensor's memory as 4-byte words, for what only moves or poisons it."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    return flat[: flat.numel() // 4 * 4].view(torch.int32)


class Buffers:
    """One set of tensors. What no contender touches is never allocated. The sets of a case share their scratch: torch's
    allocator, too, would hand out the same block again."""

    def __init__(
        self, side: Side, s: int, heads: int, scratch: dict[str, Tensor], seed: int, device: str = "cuda"
    ) -> None:
        self.side, self.s, self.heads, self.device = side, s, heads, device
        self._scratch = scratch
        self._random = torch.Generator(device=device).manual_seed(seed)

    def _normal(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=self.device, generator=self._random)

    @cached_property
    def x_full(self) -> Tensor:
        """q [S,H,192] in front, o_latent [S,H,512] behind attention."""
        return self._normal(self.s, self.heads, self.side.k + ROPE_DIM * (self.side.k == GROUP))

    @property
    def x(self) -> Tensor:
        return self.x_full[..., : self.side.k]

    @property
    def pe(self) -> Tensor | None:
        return self.x_full[..., self.side.k :] if self.side.rope else None

    @property
    def rope(self) -> Tensor:
        assert self.pe is not None, f"{self.side.name} has no rope columns"
        return self.pe

    @cached_property
    def w(self) -> Tensor:
        """[H,n,k] e4m3; W_UV is a view of the checkpoint, whose heads hold W_UK as well."""
        rows = self.side.n if self.side.k == GROUP else 2 * self.side.n
        values = self._normal(self.heads, rows, self.side.k, dtype=FP32) * (FP8_MAX / 4)
        return values.clamp(-FP8_MAX, FP8_MAX).to(E4M3)[:, rows - self.side.n :]

    @cached_property
    def w_packed(self) -> Tensor:
        return self.w.contiguous()

    @cached_property
    def w_scale(self) -> Tensor:
        shape = (self.heads, self.side.n // GROUP, self.side.k // GROUP)
        return (torch.rand(shape, device=self.device, generator=self._random) + 0.5) * 2**-11

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
        """The weights requantized with one scale, as per-tensor FP8 needs them: [H,n,k] e4m3 and fp32 [1]."""
        scale = (self.w_exact.abs().amax() / FP8_MAX).float().reshape(1)
        return reference.to_fp8(self.w_exact, scale), scale

    @cached_property
    def quantized(self) -> tuple[Tensor, Tensor]:
        return reference.quantize_q_nope(self.x, M_ALIGNMENT)

    @cached_property
    def x_scale(self) -> Tensor:
        """A static per-tensor scale that covers the activations."""
        return (self.x_full.abs().amax().float() / FP8_MAX).reshape(1)

    @cached_property
    def out_scale(self) -> Tensor:
        """A static scale that covers the output: of q, the rope columns are the largest."""
        return self.x_scale.clone()

    @cached_property
    def out(self) -> Tensor:
        """[S,H,n+rope], what the next kernel reads; for the product alone [H,S,n] in memory."""
        dtype = BF16 if self.side.out_bytes == 2 else E4M3
        if self.side.name == "gemm":
            return self.out_hs.transpose(0, 1)
        return torch.empty(self.s, self.heads, self.side.n + self.side.rope, dtype=dtype, device=self.device)

    @cached_property
    def out_hs(self) -> Tensor:
        """[H,S,n] bf16: torch.bmm's own layout, where it is the result."""
        return torch.empty(self.heads, self.s, self.side.n, dtype=BF16, device=self.device)

    @cached_property
    def masked(self) -> Tensor:
        """[H,M,n] bf16: the padded result of a masked grouped GEMM."""
        return torch.empty(self.heads, self.m, self.side.n, dtype=BF16, device=self.device)

    @cached_property
    def out_group_scale(self) -> Tensor:
        """[S,H] fp32 with strides (1, ceil4(S))."""
        return torch.empty(self.heads, ceil4(self.s), device=self.device).mT[: self.s]

    @cached_property
    def moved(self) -> Tensor:
        """What the floor writes: the output's and its scales' bytes, as words."""
        return torch.empty(self.side.written_bytes(self.s, self.heads) // 4, dtype=torch.int32, device=self.device)

    @property
    def m(self) -> int:
        return -(-self.s // M_ALIGNMENT) * M_ALIGNMENT

    @cached_property
    def masked_m(self) -> Tensor:
        return torch.full((self.heads,), self.s, dtype=torch.int32, device=self.device)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = BF16) -> Tensor:
        if name not in self._scratch:
            self._scratch[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return self._scratch[name]

    def result(self, layout: str) -> Tensor:
        """[S,H,n+rope] whatever the layout that a contender wrote."""
        if layout == "out":
            return self.out
        return (self.out_hs if layout == "out_hs" else self.masked[:, : self.s]).transpose(0, 1)

    def poison(self, layout: str) -> None:
        """Every byte 0xFF: NaN in bf16, e4m3 and fp32."""
        for tensor in (self.result(layout), self.out_group_scale):
            words(tensor).fill_(-1)

    def sample(self) -> Tensor:
        return torch.linspace(0, self.s - 1, min(self.s, SAMPLED_TOKENS), device=self.device).long().unique()

    def decode(self, layout: str) -> Tensor:
        """The sampled tokens of a result in fp64; NaN if anything anywhere was left unwritten."""
        result, tokens = self.result(layout), self.sample()
        value = result[tokens].double()
        if self.side.scale_bytes:
            value = value * self.out_group_scale[tokens].double().unsqueeze(-1)
        elif result.dtype == E4M3:
            value = value * self.out_scale.double()
        return value if all_written(result) else torch.full_like(value, math.nan)

    def exact(self) -> Tensor:
        """The sampled tokens with unquantized activations, in fp64."""
        tokens = self.sample()
        product = torch.einsum("shk,hnk->shn", self.x[tokens].double(), self.w_exact)
        return product if self.pe is None else torch.cat([product, self.pe[tokens].double()], dim=-1)

    def quantized_reference(self) -> Tensor:
        """The sampled tokens as mla_fp8.reference makes them, output rounding included, decoded to fp64."""
        tokens, side = self.sample(), self.side
        x, pe = self.x[tokens], None if self.pe is None else self.pe[tokens]
        if side.scale_bytes:
            val, scale = reference.v_up_quantized(x, self.w, self.w_scale)
            return val.view(*x.shape[:2], side.n).double() * scale.double().unsqueeze(-1)
        out_scale = self.out_scale if side.out_bytes == 1 else None
        value = reference.absorb_q(x, self.w, self.w_scale, pe, out_scale).double()
        return value if out_scale is None else value * out_scale.double()


def all_written(result: Tensor) -> bool:
    """No poison left: read in pieces, so that large outputs need no large temporaries."""
    return not any(bool(piece.isnan().any()) for piece in _float_pieces(result))


def _float_pieces(result: Tensor) -> Iterator[Tensor]:
    for piece in result.split(2048):
        yield piece.float() if piece.dtype == E4M3 else piece
