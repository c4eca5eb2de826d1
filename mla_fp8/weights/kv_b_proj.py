"""kv_b_proj cut into heads, and its 128x128 block scales: plain functions behind `AbsorbedWeights`."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mla_fp8.errors import require, require_int
from mla_fp8.formats import E4M3, FP8_MAX, GROUP, MAX_EXTENT, MIN_AMAX_FLOOR, WEIGHT_ALIGN_BYTES, to_fp8
from mla_fp8.weights.ambient import plain_tensors

UNQUANTIZED = (torch.bfloat16, torch.float16, torch.float32)
FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)  # fp32 holds them all
# DeepSeek's name; that of compressed-tensors (FP8_BLOCK) and ModelOpt (FP8_PB_WO). Both multiply.
SCALE_NAMES = ("weight_scale_inv", "weight_scale")
SCALE_DTYPES = "be float32, bfloat16, float16, float8_e8m0fnu, or uint8 exponents with scale_fmt 'ue8m0'"
SCALE = "weight_scale_inv"
E8M0_ZERO_BITS = 0x0040_0000  # exponent code 0 is 2^-127, a subnormal of fp32
FP32_MANTISSA_BITS = 23


class HeadDims(NamedTuple):
    """How kv_b_proj's rows [H*(D+V)] split into heads."""

    num_heads: int  # H
    qk_nope_head_dim: int  # D
    v_head_dim: int  # V

    @property
    def rows(self) -> int:
        return self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)


def require_head_dim(where: str, argument: str, value: object) -> None:
    """A head's rows can be cut out only if they end where a block of scales ends."""
    ok = isinstance(value, int) and 0 < value <= MAX_EXTENT and value % GROUP == 0
    rule = f"be a multiple of {GROUP}, for one scale covers a {GROUP}x{GROUP} block and no block may span two heads"
    supported = f"supported: {GROUP}, {2 * GROUP}, {3 * GROUP}, ..., {MAX_EXTENT}"
    require(ok, where, argument, f"{rule} ({supported})", repr(value))


def require_weight(where: str, weight: Tensor, dtypes: tuple[torch.dtype, ...], dims: HeadDims) -> None:
    """`weight` is kv_b_proj [H*(D+V), R] of these dims."""
    require_int(where, "num_heads", dims.num_heads, 1)
    require_head_dim(where, "qk_nope_head_dim", dims.qk_nope_head_dim)
    require_head_dim(where, "v_head_dim", dims.v_head_dim)
    require(weight.dtype in dtypes, where, "weight", "be " + " or ".join(map(str, dtypes)), weight.dtype)
    require(weight.dim() == 2, where, "weight", "have 2 dimensions", list(weight.shape))
    rule = f"have {dims.num_heads} * ({dims.qk_nope_head_dim} + {dims.v_head_dim}) = {dims.rows} rows"
    require(weight.shape[0] == dims.rows, where, "weight", rule, list(weight.shape))
    require_head_dim(where, "kv_lora_rank", weight.shape[1])


def has_values(tensor: Tensor) -> bool:
    """Not on meta, nor of a FakeTensorMode: there are numbers that can be looked at."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def same_numbers(shape: list[int], blocks: list[int]) -> bool:
    """Whether a shape is that of the blocks, but for extents of 1: [8, 1, 4, 1] is [8, 4], as ModelOpt writes it."""
    return [extent for extent in shape if extent != 1] == [extent for extent in blocks if extent != 1]


def decode_scale(where: str, scale: Tensor, scale_fmt: str | None, name: str = SCALE) -> Tensor:
    """Any scale that a checkpoint may hold -> finite float32; `name` is what an error calls it."""
    exponents = scale.dtype == torch.float8_e8m0fnu or (scale.dtype == torch.uint8 and scale_fmt == "ue8m0")
    got = f"{scale.dtype} with scale_fmt {scale_fmt!r}"
    require(exponents or scale.dtype in FLOAT_SCALES, where, name, SCALE_DTYPES, got)
    if exponents:
        codes = scale.view(torch.uint8).int()
        bits = torch.where(codes == 0, E8M0_ZERO_BITS, codes << FP32_MANTISSA_BITS)
        scale = bits.view(torch.float32)  # 255, the format's NaN, becomes Inf
    require_finite(where, name, scale)
    return scale.float()


def require_finite(where: str, name: str, blocks: Tensor) -> None:
    if has_values(blocks):
        bad = (~blocks.isfinite()).nonzero()
        require(bad.shape[0] == 0, where, name, "be finite", f"NaN or Inf in block {bad[:1].tolist()}")


@plain_tensors()
def cut_heads(
    where: str,
    weight: Tensor,
    scale: Tensor,
    dims: HeadDims,
    scale_fmt: str | None,
    copy_w_uv: bool,
    scale_name: str = SCALE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kv_b_proj -> w_uk [H,R,D], its scale, w_uv [H,V,R] (a view where it may be one), its scale; no bit is lost."""
    require_weight(where, weight, (E4M3,), dims)
    blocks = [extent // GROUP for extent in weight.shape]
    rule = f"be {blocks}, one scale a {GROUP}x{GROUP} block of weight"
    require(same_numbers(list(scale.shape), blocks), where, scale_name, rule, list(scale.shape))
    require(scale.device == weight.device, where, scale_name, f"be on {weight.device}", scale.device)
    scale = decode_scale(where, scale.detach().reshape(blocks), scale_fmt, scale_name)

    heads, nope, v_dim = dims
    w_uk, w_uv = torch.split(weight.detach().view(heads, nope + v_dim, -1), [nope, v_dim], dim=1)
    uk_scale, uv_scale = torch.split(scale.view(heads, -1, blocks[1]), [nope // GROUP, v_dim // GROUP], dim=1)
    aligned = not any(
        n % WEIGHT_ALIGN_BYTES for n in (w_uv.data_ptr() if has_values(weight) else 0, *w_uv.stride()[:2])
    )
    if copy_w_uv or w_uv.stride(2) != 1 or not aligned:
        w_uv = contiguous_copy(w_uv)
    return contiguous_copy(w_uk.mT), contiguous_copy(uk_scale.mT), w_uv, contiguous_copy(uv_scale)


@plain_tensors()
def quantize_blocks(where: str, weight: Tensor, dims: HeadDims, amax_floor: float) -> tuple[Tensor, Tensor]:
    """Unquantized kv_b_proj [N,R] -> e4m3 [N,R] and fp32 [N/128,R/128]; tensor division is IEEE on CUDA too."""
    require_weight(where, weight, UNQUANTIZED, dims)
    ok = MIN_AMAX_FLOOR <= amax_floor < float("inf")
    require(ok, where, "amax_floor", f"be finite and >= {MIN_AMAX_FLOOR}", amax_floor)
    blocks = weight.detach().float().view(-1, GROUP, weight.shape[1] // GROUP, GROUP)
    amax = blocks.abs().amax((1, 3))
    require_finite(where, "weight", amax)
    floor = torch.tensor(amax_floor, dtype=torch.float32, device=weight.device)
    scale = torch.maximum(amax, floor) / torch.full_like(floor, FP8_MAX)
    return to_fp8(blocks, scale[:, None, :, None]).reshape(weight.shape), scale


def contiguous_copy(tensor: Tensor) -> Tensor:
    """A copy that owns its memory, and no more of it than `tensor` has elements."""
    return tensor.clone(memory_format=torch.contiguous_format)
