"""What the plugins of serving engines share: an MLA layer's two 16-bit weights, held as the FP8 blocks they came from.

An engine cuts kv_b_proj into W_UK and W_UV, keeps 16-bit copies and multiplies by `torch.bmm`. A plugin puts a
`BlockFp8Weight` where each copy stands. Nothing here imports an engine.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mla_fp8 import devices
from mla_fp8.formats import E4M3, GROUP
from mla_fp8.weights import AbsorbedWeights, BlockFp8Weight
from mla_fp8.weights.block_parts import numbers
from mla_fp8.weights.kv_b_proj import SCALE_NAMES

# Relative error (L2) of a head of the engine's 16-bit weight from ours. Rounding to e4m3 once more, as an engine does
# that turns scales into powers of two, is 2.6e-2 for normal data; numbers of another head or layout are above 1.
MOST_DIFFERENCE = 0.05


class StepAside(Exception):  # noqa: N818  (no error: the layer stays as the engine made it)
    """The reason for which a layer keeps the engine's own weights."""


@dataclass(frozen=True)
class LayerDims:
    """Of the heads that a rank has."""

    num_heads: int
    qk_nope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int

    @property
    def rows(self) -> int:
        """Of kv_b_proj's weight."""
        return self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)


def read_blocks(
    projection: nn.Module, dims: LayerDims, *, quantize: bool = False, copy_w_uv: bool = True
) -> AbsorbedWeights:
    """Cut kv_b_proj's FP8 blocks, as the checkpoint has them.

    Args:
        projection: holds `weight` [H*(D+V), R], and its block scales by one of the names in SCALE_NAMES.
        dims: H, D, V and R.
        quantize: take a weight of 16 or 32 bits too, with loss (`AbsorbedWeights.from_bf16`).
        copy_w_uv: False: w_uv is a view of kv_b_proj's weight, for an engine that leaves that as it is.

    Raises:
        StepAside: with the reason.
    """
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        raise StepAside("kv_b_proj has no weight to read")
    if weight.is_cuda and torch.version.hip:  # whose gfx90a has Hopper's capability, by number
        raise StepAside("the GPU is one of ROCm")
    if weight.is_cuda and (reason := devices.why_not_on(weight.device)):
        raise StepAside(reason)
    if getattr(projection, "bias", None) is not None:
        raise StepAside("kv_b_proj has a bias")
    expected = dims.rows, dims.kv_lora_rank
    if weight.shape != expected:
        raise StepAside(f"kv_b_proj.weight is {list(weight.shape)}, not {list(expected)}")
    try:
        if weight.dtype != E4M3:
            if not (quantize and weight.dtype in (torch.bfloat16, torch.float16, torch.float32)):
                raise StepAside(f"kv_b_proj.weight is {weight.dtype}, not FP8 in {GROUP}x{GROUP} blocks")
            return quantized(weight, dims)
        return AbsorbedWeights.from_kv_b_proj(
            weight.detach(),
            block_scale(projection, weight),
            dims.num_heads,
            qk_nope_head_dim=dims.qk_nope_head_dim,
            v_head_dim=dims.v_head_dim,
            copy_w_uv=copy_w_uv,
        )
    except ValueError as error:  # head dims that no kernel takes, scales that are not finite
        raise StepAside(str(error)) from error


def quantized(weight: Tensor, dims: LayerDims) -> AbsorbedWeights:
    """Kv_b_proj's rows in 16 or 32 bits, with loss."""
    return AbsorbedWeights.from_bf16(
        weight.detach(), dims.num_heads, qk_nope_head_dim=dims.qk_nope_head_dim, v_head_dim=dims.v_head_dim
    )


def block_scale(projection: nn.Module, weight: Tensor) -> Tensor:
    """Kv_b_proj's scales, one a 128x128 block."""
    expected = [-(-extent // GROUP) for extent in weight.shape]
    found = {name: getattr(projection, name, None) for name in SCALE_NAMES}
    for scale in found.values():
        if isinstance(scale, Tensor) and list(scale.shape) == expected and scale.is_floating_point():
            return scale.detach().float()
    tensors = {name: scale for name, scale in found.items() if isinstance(scale, Tensor)}
    shapes = {name: f"{str(scale.dtype).removeprefix('torch.')} {list(scale.shape)}" for name, scale in tensors.items()}
    raise StepAside(f"kv_b_proj has scales {shapes or 'of no known name'}, not one {expected} a {GROUP}x{GROUP} block")


def as_weights(blocks: AbsorbedWeights, dtype: torch.dtype) -> tuple[BlockFp8Weight, BlockFp8Weight]:
    """W_UK [H, D, R] and W_UV [H, R, V], which multiply rows from the left."""
    return (
        BlockFp8Weight(blocks.w_uk, blocks.w_uk_scale, dtype),
        BlockFp8Weight(blocks.w_uv, blocks.w_uv_scale, dtype),
    )


def require_same_numbers(name: str, stock: object, weight: BlockFp8Weight, most: float = MOST_DIFFERENCE) -> None:
    """The self-test at load: what the engine made and what would stand in its place are the same weight.

    Args:
        most: that a head's numbers may be apart, relative, once ours are rounded as the engine's; 0: they are equal.

    Raises:
        StepAside: shape, dtype, device, or numbers of a head that are further apart.
    """
    if type(stock) not in (Tensor, nn.Parameter):
        raise StepAside(f"{name} is a {type(stock).__name__}, not a Tensor")
    assert isinstance(stock, Tensor)
    for what in ("shape", "dtype", "device"):
        if getattr(stock, what) != getattr(weight, what):
            raise StepAside(f"{name} has {what} {getattr(stock, what)}, not {getattr(weight, what)}")
    ours = numbers(weight.weight, weight.scale, stock.dtype).transpose(1, 2).float()
    theirs = stock.detach().float()
    off = ((ours - theirs).square().sum((1, 2)) / theirs.square().sum((1, 2)).clamp(min=1e-30)).sqrt().max().item()
    if not off <= most:  # NaN too
        raise StepAside(f"{name} differs from kv_b_proj's blocks, in a head by more than {most}")


@dataclass
class Summary:
    """What became of a model's layers: said in one line when the last one has been loaded."""

    log: logging.Logger
    done: int = 0
    freed_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def layers(self) -> int:
        """How many it has to tell of."""
        return self.done + self.reasons.total()

    def replaced(
        self, stock: tuple[Tensor, ...], mine: tuple[BlockFp8Weight, ...], stays: tuple[Tensor, ...] = ()
    ) -> None:
        """Count a layer whose engine loses `stock`; what is a view of what `stays` frees nothing, and costs nothing."""
        self.done += 1
        kept = {tensor.untyped_storage().data_ptr() for tensor in stays}
        freed = [tensor.nbytes for tensor in stock if tensor.untyped_storage().data_ptr() not in kept]
        parts = [part for weight in mine for part in (weight.weight, weight.scale)]
        held = [part.nbytes for part in parts if part.untyped_storage().data_ptr() not in kept]
        self.freed_bytes += sum(freed) - sum(held)

    def say(self, what: str) -> None:
        """Log the line and begin anew."""
        reasons, freed = self.reasons, self.freed_bytes
        why = "; ".join(f"{count} as before: {reason}" for reason, count in reasons.most_common())
        memory = f"{abs(freed) / 1e6:.1f} MB {'freed' if freed >= 0 else 'more'}"
        text = f"mla_fp8: {self.done} of {self.layers} MLA layers run {what} from FP8, {memory}"
        self.log.log(logging.WARNING if reasons else logging.INFO, "%s", f"{text}; {why}" if why else text)
        self.done, self.freed_bytes, self.reasons = 0, 0, Counter()


def guarded(log: logging.Logger, what: str, step: Callable[[], None]) -> None:
    """Run a plugin's own step: whatever fails in it is said and takes nothing down."""
    try:
        step()
    except Exception as error:
        log.warning("mla_fp8: %s failed, the layer stays as it was: %r", what, error)
