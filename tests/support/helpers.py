"""What the op tests compare with, the layouts they feed, and the poison they put around memory."""

import itertools

import pytest
import torch
from torch import Tensor

from mla_fp8.cli.compare import PRODUCT, SUM_ERROR

E4M3 = torch.float8_e4m3fn
POISON = 0xFF  # repeated, it is a NaN in e4m3, fp16, bf16 and fp32
GUARD = 64  # elements of poison before and after what a test lays out

# A result rounded once to bf16 is off by at most 2^-9 of itself, and by some 1.7e-3 of the norm; fp16 is 8 times finer.
ROUNDING_FROBENIUS = 3e-3

# A step of a format is at most 2^-7 or 2^-10 of a value, its error at most half of that, and evenly spread 1 / sqrt(3)
# of this in the root mean square. A tensor core's sums are off by 2e-4 besides, in the square.
EXACT_FROBENIUS = {torch.bfloat16: 2.3e-3, torch.float16: 3.5e-4}

# Activations rounded to e4m3 (3 fraction bits: at most 2^-4 of a value, 2.6e-2 in the mean square of normal data).
FP8_FROBENIUS = 2.9e-2
FP8_TWICE_FROBENIUS = 2**0.5 * FP8_FROBENIUS  # activations and output
CALC_DIFF = 1e-3  # DeepGEMM's measure, half the square of the relative error


def randn(rng, *shape, dtype=torch.float32, device="cpu") -> Tensor:
    return torch.randn(shape, generator=rng).to(device, dtype)


def rand(rng, *shape, device="cpu") -> Tensor:
    return torch.rand(shape, generator=rng).to(device)


def random_weight(rng, h, n, k, device="cpu") -> tuple[Tensor, Tensor]:
    """e4m3 [H,N,K] using most codes, and block scales that make it about N(0, 0.08)."""
    weight = (randn(rng, h, n, k) * 80).clamp(-448, 448).to(E4M3)
    return weight.to(device), (rand(rng, h, n // 128, k // 128, device=device) + 0.5) * 1e-3


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def fail_at_worst(wrong: Tensor, got: Tensor, want: Tensor, what: str) -> None:
    """Fails if any element is wrong, showing the one farthest off."""
    if not wrong.any():
        return
    distance = (got.double() - want.double()).abs().nan_to_num(nan=float("inf"))
    flat = int(torch.where(wrong, distance, -1.0).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), wrong.shape))
    pytest.fail(
        f"{what} {tuple(got.shape)}: {int(wrong.sum())} of {wrong.numel()} elements are wrong, the worst at {index}: "
        f"got {got[index].double().item()!r}, want {want[index].double().item()!r}"
    )


def assert_same_bits(got: Tensor, want: Tensor, what: str = "output") -> None:
    """Equal shape, dtype and bits, where any NaN equals any NaN."""
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device), what
    both_nan = got.float().isnan() & want.float().isnan()
    fail_at_worst((bits(got) != bits(want)) & ~both_nan, got, want, what)


def assert_rounded(got: Tensor, exact: Tensor, error: Tensor, rounding, what: str = "output") -> None:
    """Each element is what `rounding`, a monotone function, makes of some value within `error` of `exact`.

    An infinite error lets anything pass.
    """
    assert got.shape == exact.shape, what
    error = torch.where(exact.isfinite(), error, 0.0)
    anything = error.isinf()
    low, high = rounding(exact - error), rounding(exact + error)
    assert got.dtype == low.dtype, what
    right = (got.double() >= low.double()) & (got.double() <= high.double())
    is_nan = got.double().isnan() & low.double().isnan() & high.double().isnan()
    fail_at_worst(~(right | anything | is_nan), got, rounding(exact), what)


def assert_frobenius(got: Tensor, want: Tensor, bound: float, what: str = "output") -> None:
    norm = want.double().norm()
    error = (got.double() - want.double()).norm() / norm if norm > 0 else got.double().norm()
    if not error <= bound:
        fail_at_worst(
            torch.ones_like(want, dtype=torch.bool), got, want, f"{what}: Frobenius {error:.3e} > {bound:.1e};"
        )


def calc_diff(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


def reference_product(x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor) -> tuple[Tensor, Tensor]:
    """[S,H,K] x [H,N,K]ᵀ in fp64, and how far the kernels' fp32 sum may be off: on CUDA by nothing."""
    device = x.device.type
    product = PRODUCT[device](x, x_scale, w, w_scale).double()
    # |x| |w| bounds a group's magnitude.
    x_norm, w_norm = (t.double().unflatten(-1, (-1, 128)).norm(dim=-1) for t in (x, w))
    x_norm = x_norm if x_scale is None else x_norm * x_scale.double().abs()
    w_norm = w_norm * w_scale.double().abs().repeat_interleave(128, -2)
    return product, torch.einsum("shk,hnk->shn", x_norm, w_norm) * SUM_ERROR[device]


def strided(shape, strides, offset, dtype, device="cpu") -> tuple[Tensor, Tensor]:
    """A view of a poisoned buffer, and the buffer; strides and offset in elements."""
    last = sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
    size_bytes = (offset + last + 1 + GUARD) * dtype.itemsize
    buffer = torch.full((size_bytes,), POISON, dtype=torch.uint8, device=device).view(dtype)
    return buffer.as_strided(shape, strides, offset), buffer


def assert_untouched_outside(buffer: Tensor, *views: Tensor) -> None:
    """Every byte of the buffer that belongs to none of the views still is poison."""
    outside = torch.ones(buffer.numel(), dtype=torch.bool, device=buffer.device)
    for view in views:
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    written = (buffer.view(torch.uint8).view(buffer.numel(), -1) != POISON).any(1) & outside
    assert not written.any(), f"written outside the output, first at element {int(written.nonzero()[0])} of the buffer"


def contiguous_strides(shape) -> tuple[int, ...]:
    return tuple(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1]


# Strides and storage offset of [X,Y,K] tensors whose last dim is contiguous.
ROW_LAYOUTS = {
    "contiguous": lambda x, y, k: ((y * k, k, 1), 0),
    "first_columns": lambda x, y, k: ((y * (k + 64), k + 64, 1), 0),
    "last_columns": lambda x, y, k: ((y * (k + 64), k + 64, 1), 64),
    "transposed": lambda x, y, k: ((k, x * k, 1), GUARD),
    "odd": lambda x, y, k: ((y * (k + 1) + 3, k + 1, 1), 1),
}
# The same for weights, whose strides are multiples of 16.
WEIGHT_LAYOUTS = {
    "of_kv_b_proj": lambda h, n, k: ((2 * n * k, k, 1), n * k),
    "padded": lambda h, n, k: ((n * (k + 16) + 32, k + 16, 1), 16),
    "transposed": lambda h, n, k: ((k, h * k, 1), 0),
}
# The same for scales, which may have any strides.
SCALE_LAYOUTS = {
    "odd": lambda x, y, z: (((7 * z + 2) * y + 5, 7 * z + 2, 7), 3),
    "reversed": lambda x, y, z: ((1, x + 1, (x + 1) * y + 1), 1),
}


def laid_out(values: Tensor, layout) -> Tensor:
    """The same values, laid out by one of the functions above, with poison between the rows."""
    view, _ = strided(values.shape, *layout(*values.shape), values.dtype, values.device)
    return view.copy_(values)
