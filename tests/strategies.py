"""Hypothesis strategies: extents, layouts, and rows of values that numbers in a model may take."""

import helpers
import torch
from hypothesis import strategies as st

dtypes = st.sampled_from([torch.bfloat16, torch.float16])
tokens = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65]))
heads = st.integers(1, 3)
widths = st.sampled_from([128, 256, 384])
seeds = st.integers(0, 2**31 - 1)

KINDS = ("normal", "outlier", "zeros", "negative_zeros", "subnormal", "tiny", "largest", "wide_range", "nan", "inf")


def rows_of_kind(kind: str, rng, count: int, k: int, dtype) -> torch.Tensor:
    """[count, K] in fp64, before rounding to dtype."""
    info = torch.finfo(dtype)
    x = torch.randn(count, k, generator=rng, dtype=torch.float64)
    if kind == "zeros":
        return x * 0.0
    if kind == "negative_zeros":
        return -(x * 0.0).abs()
    if kind == "subnormal":
        return (x * 0.3).clamp(-1, 1) * info.tiny
    if kind == "tiny":
        return x * 1e-5
    if kind == "largest":
        return x.sign() * info.max
    if kind == "wide_range":
        return x * 10 ** (torch.rand(count, k, generator=rng, dtype=torch.float64) * 8 - 5)
    place = torch.randint(0, k, (count, 1), generator=rng)
    special = {"outlier": 2e4, "nan": float("nan"), "inf": float("inf")}
    return x if kind == "normal" else x.scatter(1, place, x.sign()[:, :1] * special[kind])


@st.composite
def activations(draw, kinds=KINDS, widths=widths, layouts=True):
    """[S,H,K] of some dtype, its rows of different kinds, in some layout."""
    s, h, k, dtype = draw(tokens), draw(heads), draw(widths), draw(dtypes)
    rng = torch.Generator().manual_seed(draw(seeds))
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))
    which = torch.randint(0, len(chosen), (s * h,), generator=rng)
    rows = torch.zeros(s * h, k, dtype=torch.float64)
    for i, kind in enumerate(chosen):
        rows = torch.where((which == i)[:, None], rows_of_kind(kind, rng, s * h, k, dtype), rows)
    x = rows.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max) if "inf" not in chosen else rows
    return lay_out(draw, x.to(dtype).view(s, h, k)) if layouts else x.to(dtype).view(s, h, k)


def lay_out(draw, x):
    """The same values in rows that are packed, padded, transposed, or repeated by a stride of 0."""
    s, h, k = x.shape
    kind = draw(st.sampled_from(["contiguous", "padded", "transposed", "expanded_tokens", "expanded_heads"]))
    if kind == "expanded_tokens" and s > 0:
        return x[:1].expand(s, h, k)
    if kind == "expanded_heads":
        return x[:, :1].expand(s, h, k)
    gap, offset = draw(st.integers(0, 65)), draw(st.integers(0, 9))
    if kind == "padded":
        strides = (h * (k + gap) + draw(st.integers(0, 9)), k + gap, 1)
    elif kind == "transposed":
        strides = (k + gap, s * (k + gap) + draw(st.integers(0, 9)), 1)
    else:
        strides, offset = (h * k, k, 1), 0
    return helpers.strided(x.shape, strides, offset, x.dtype)[0].copy_(x)


@st.composite
def weights(draw, h: int, k: int, n: int | None = None):
    """e4m3 [H,N,K] in strides that are multiples of 16, and block scales in any strides."""
    n = draw(st.sampled_from([128, 256])) if n is None else n
    rng = torch.Generator().manual_seed(draw(seeds))
    weight, scale = helpers.random_weight(rng, h, n, k)
    if draw(st.booleans()):
        weight = torch.where(torch.rand(weight.shape, generator=rng) < 0.3, 0.0, weight.float()).to(weight.dtype)
    if draw(st.booleans()):
        scale = scale * 10 ** (torch.rand(scale.shape, generator=rng) * 6 - 4)
    pad, gap = 16 * draw(st.integers(0, 3)), 16 * draw(st.integers(0, 3))
    strides = (n * (k + pad) + gap, k + pad, 1)
    weight = helpers.strided(weight.shape, strides, 16 * draw(st.integers(0, 2)), weight.dtype)[0].copy_(weight)
    layout = draw(st.sampled_from(list(helpers.SCALE_LAYOUTS)))
    return weight, helpers.laid_out(scale, helpers.SCALE_LAYOUTS[layout])
