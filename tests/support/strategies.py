"""Hypothesis strategies: extents, layouts, and rows of values that numbers in a model may take."""

import helpers
import torch
from hypothesis import strategies as st

dtypes = st.sampled_from([torch.bfloat16, torch.float16])
tokens = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 131, 133, 300]))
heads = st.integers(1, 3)
many_heads = st.sampled_from([1, 2, 3, 5, 16])  # of few tokens
WIDTHS = (128, 128, 256, 384, 512, 640, 1536)
seeds = st.integers(0, 2**31 - 1)

FEW_TOKENS = 17
MOST_VALUES = 40_000  # of activations, and
MOST_WEIGHT_COLUMNS = 2048  # K of all heads: the fp64 reference takes most of a case's time
WEIGHT_STEP = 16  # strides of a weight are multiples of it
KINDS = ("normal", "outlier", "zeros", "negative_zeros", "subnormal", "tiny", "largest", "wide_range", "nan", "inf")
# What a block of weights is multiplied by beside random_weight's own scale; the last ones leave fp32's normal range.
SCALE_KINDS = {"plain": (0, 0), "wide": (-4, 2), "large": (20, 36), "small": (-38, -20), "subnormal": (-42, -36)}


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
def rows(draw, shape, dtype):
    """[S,H,K] of up to three kinds of rows, contiguous."""
    *outer, k = shape
    count = torch.Size(outer).numel()
    rng = torch.Generator().manual_seed(draw(seeds))
    chosen = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    which = torch.randint(0, len(chosen), (count,), generator=rng)
    x = torch.zeros(count, k, dtype=torch.float64)
    for i, kind in enumerate(chosen):
        x = torch.where((which == i)[:, None], rows_of_kind(kind, rng, count, k, dtype), x)
    most = torch.finfo(dtype).max
    x = x.clamp(-most, most) if "inf" not in chosen else x
    return x.to(dtype).view(shape)


@st.composite
def activations(draw):
    """[S,H,K] of some dtype, its rows of different kinds, in some layout."""
    s = draw(tokens)
    h = draw(many_heads) if s <= FEW_TOKENS else draw(heads)
    fitting = [k for k in WIDTHS if s * h * k <= MOST_VALUES and h * k <= MOST_WEIGHT_COLUMNS]
    return lay_out(draw, draw(rows((s, h, draw(st.sampled_from(fitting or WIDTHS[:1]))), draw(dtypes))))


def nested_strides(draw, shape, step=1, free_last=False):
    """Strides in which each element has a place of its own: dims in any order, with gaps of multiples of `step`."""
    dims = list(range(len(shape) if free_last else len(shape) - 1))
    order = [*([] if free_last else [len(shape) - 1]), *draw(st.permutations(dims))]  # innermost first
    strides, reach = [0] * len(shape), 1
    for dim in order:
        strides[dim] = reach
        reach = reach * max(shape[dim], 1) + step * draw(st.sampled_from([0, 0, 1, 3, 64]))
    return tuple(strides)


def place(draw, like, step=1, free_last=False):
    """A poisoned view shaped like the tensor, on its device, in any layout, and the buffer that it lies in."""
    strides = nested_strides(draw, like.shape, step, free_last)
    return helpers.strided(like.shape, strides, step * draw(st.integers(0, 9)), like.dtype, like.device)


def lay_out(draw, x, step=1, free_last=False):
    """The same values, laid out in any way; the tokens or heads of activations may also repeat by a stride of 0."""
    repeated = draw(st.sampled_from(["", "", "", "tokens", "heads"])) if step == 1 and not free_last else ""
    if repeated == "tokens" and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    if repeated == "heads":
        return x[:, :1].expand(x.shape)
    return place(draw, x, step, free_last)[0].copy_(x)


@st.composite
def weights(draw, h: int, k: int, n: int | None = None):
    """e4m3 [H,N,K] in strides that are multiples of 16, and block scales in any strides; a few blocks are special."""
    n = draw(st.sampled_from([128, 256, 384, 512])) if n is None else n
    rng = torch.Generator().manual_seed(draw(seeds))
    weight, scale = helpers.random_weight(rng, h, n, k)
    if draw(st.booleans()):
        weight = torch.where(torch.rand(weight.shape, generator=rng) < 0.3, 0.0, weight.float()).to(weight.dtype)
    low, high = SCALE_KINDS[draw(st.sampled_from(list(SCALE_KINDS)))]
    scale = scale * 10.0 ** (torch.rand(scale.shape, generator=rng) * (high - low) + low)
    special = draw(st.sampled_from([None, None, None, 0.0, float("nan")]))
    if special is not None:
        scale = torch.where(torch.rand(scale.shape, generator=rng) < 0.2, special, scale)
    if draw(st.sampled_from([False, False, False, True])):  # both codes of NaN
        codes = weight.view(torch.uint8)
        rare = torch.rand(weight.shape, generator=rng) < 1e-4
        weight = torch.where(rare, codes | 0x7F, codes).view(weight.dtype)
    return lay_out(draw, weight, step=WEIGHT_STEP), lay_out(draw, scale, free_last=True)
