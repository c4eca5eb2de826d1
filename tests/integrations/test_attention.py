"""attend_latents against fp64, masks, bad input."""

import pytest
import torch
from helpers import ROUNDING_FROBENIUS, assert_frobenius, randn

from mla_fp8.attention import attend_latents

SCALE = 192**-0.5
# Softmax weights rounded to the inputs' dtype, then the result: two roundings of ROUNDING_FROBENIUS at most. fp32: sums
# of 576 and T products, far below 2^10 roundings of 2^-24.
BOUND = {torch.bfloat16: 2 * ROUNDING_FROBENIUS, torch.float16: 2 * ROUNDING_FROBENIUS / 8, torch.float32: 2.0**-14}


def inputs(rng, dtype, batch=2, queries=3, heads=4, tokens=70, lora=512, rope=64, device="cpu"):
    cache = randn(rng, batch, tokens, lora + rope, dtype=dtype, device=device)  # views with gaps, as caches are
    q = randn(rng, batch, queries, heads, lora + rope, dtype=dtype, device=device)
    return q, *cache.split([lora, rope], dim=-1)


def exact(q, kv_latent, k_pe, mask=None):
    logits = torch.einsum("bshc,btc->bsht", q.double(), torch.cat([kv_latent, k_pe], -1).double()) * SCALE
    if mask is not None:
        mask = mask.transpose(1, 2)
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return torch.einsum("bsht,btr->bshr", logits.softmax(-1), kv_latent.double())


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("masked", ["no", "shared", "per_head"])
def test_attend_latents_matches_reference(rng, device, dtype, masked):
    q, kv_latent, k_pe = inputs(rng, dtype, device=device)
    mask = None
    if masked != "no":
        mask = torch.rand(2, 4 if masked == "per_head" else 1, 3, 70, generator=rng).to(device) < 0.5
        mask[..., 0] = True
    got = attend_latents(q, kv_latent, k_pe, mask, scale=SCALE)
    assert got.dtype == dtype and got.is_contiguous()
    assert_frobenius(got, exact(q, kv_latent, k_pe, mask), BOUND[dtype])


@pytest.mark.parametrize("queries, heads, tokens", [(1, 1, 1), (1, 16, 9), (5, 2, 5), (0, 4, 9)])
def test_attend_latents_edge_shapes(rng, device, queries, heads, tokens):
    q, kv_latent, k_pe = inputs(rng, torch.bfloat16, queries=queries, heads=heads, tokens=tokens, device=device)
    got = attend_latents(q, kv_latent, k_pe, scale=SCALE)
    assert got.shape == (2, queries, heads, 512)
    assert_frobenius(got, exact(q, kv_latent, k_pe), BOUND[torch.bfloat16])


@pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.bfloat16).min])
def test_attend_latents_adds_a_float_mask(rng, device, lowest):
    q, kv_latent, k_pe = inputs(rng, torch.bfloat16, device=device)
    seen = (torch.rand(2, 1, 3, 70, generator=rng) < 0.5).to(device)
    seen[..., 3] = True
    added = torch.zeros(seen.shape, device=device).masked_fill(~seen, lowest).bfloat16()
    got = attend_latents(q, kv_latent, k_pe, added, scale=SCALE)
    torch.testing.assert_close(got, attend_latents(q, kv_latent, k_pe, seen, scale=SCALE), rtol=0, atol=0)
    shift = torch.linspace(-3, 3, 70, device=device).expand(1, 1, 3, 70)
    want = exact(q, kv_latent, k_pe, shift)
    assert_frobenius(attend_latents(q, kv_latent, k_pe, shift, scale=SCALE), want, BOUND[torch.bfloat16])


@pytest.mark.parametrize("kind", ["bool", "inf"])
def test_attend_latents_of_a_query_that_sees_nothing_is_the_mean(rng, device, kind):
    q, kv_latent, k_pe = inputs(rng, torch.bfloat16, device=device)
    mask = torch.ones(2, 1, 3, 70, dtype=torch.bool, device=device)
    mask[1, :, 2] = False
    given = mask if kind == "bool" else torch.zeros(mask.shape, device=device).masked_fill(~mask, float("-inf"))
    got = attend_latents(q, kv_latent, k_pe, given, scale=SCALE)
    want = exact(q, kv_latent, k_pe)
    want[1, 2] = kv_latent[1].double().mean(0)
    assert_frobenius(got, want, BOUND[torch.bfloat16])
    assert_frobenius(got[1, 2], want[1, 2], 2 * BOUND[torch.bfloat16])


def test_attend_latents_compiled(rng):
    compiled = torch.compile(attend_latents, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 70):
        q, kv_latent, k_pe = inputs(rng, torch.bfloat16, tokens=tokens)
        mask = torch.rand(2, 1, 3, tokens, generator=rng) < 0.5
        want = attend_latents(q, kv_latent, k_pe, mask, scale=SCALE)
        torch.testing.assert_close(compiled(q, kv_latent, k_pe, mask, scale=SCALE), want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 4, 576)}, r"q must have 4 dimensions, got \[2, 4, 576\]"),
        ({"kv_latent": torch.zeros(1, 9, 512)}, r"kv_latent must be \[2, 9, 512\], got \[1, 9, 512\]"),
        ({"kv_latent": torch.zeros(9, 512)}, r"kv_latent must have 3 dimensions, got \[9, 512\]"),
        ({"k_pe": torch.zeros(2, 9, 32)}, r"k_pe must be \[2, 9, 64\], got \[2, 9, 32\]"),
        ({"k_pe": torch.zeros(2, 9, 64).half()}, "k_pe must be torch.float32 as q is, got torch.float16"),
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, r"mask must broadcast to \[2, 4, 1, 9\], got \[2, 9\]"),
        ({"mask": torch.ones(2, 1, 1, 8)}, r"mask must broadcast to \[2, 4, 1, 9\], got \[2, 1, 1, 8\]"),
    ],
)
def test_attend_latents_rejects(change, message):
    arguments = {"q": torch.zeros(2, 1, 4, 576), "kv_latent": torch.zeros(2, 9, 512), "k_pe": torch.zeros(2, 9, 64)}
    with pytest.raises(ValueError, match="attend_latents: " + message):
        attend_latents(**{**arguments, **change}, scale=SCALE)
