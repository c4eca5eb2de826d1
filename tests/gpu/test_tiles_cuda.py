"""Every compiled tile that can run a problem gives the same bits: the choice of a configuration shows in time only.

They are the reference's, of both activations and both dtypes.
"""

import pytest
import torch
from cases import ACTIVATIONS, OPS, each_activations
from helpers import assert_same_bits
from product_inputs import (
    HEAD_DIM,
    LATENT,
    ROPE_DIM,
    first_heads,
    make_absorb_weight,
    make_v_weight,
    random_q,
    reference_absorb_q,
    reference_v_all,
)

from mla_fp8 import reference
from mla_fp8.config import Op, forced_tile, tiles
from mla_fp8.formats import EXACT_TERMS

pytestmark = pytest.mark.gpu
TOKENS, HEADS = 130, 5  # a last row tile with 2 rows, whatever the tile


def runnable(op, out_bytes, terms=1):
    """Symbols of tiles that take DeepSeek's extents."""
    fits = [tile for tile in tiles() if tile.op == op and tile.out_bytes in (0, out_bytes)]
    return [tile.symbol for tile in fits if tile.terms >= terms]


def terms_of(dtype, activations):
    return EXACT_TERMS[dtype] if activations == "exact" else 1


def same_from_every_tile(symbols, call, want):
    assert len(symbols) > 1
    for symbol in symbols:
        with forced_tile(symbol):
            got = call()
        for one, other in zip(got, want, strict=True):
            assert_same_bits(one, other, symbol)


@each_activations
@pytest.mark.parametrize("out_bytes", [2, 1])
@pytest.mark.parametrize("rope_dim", [ROPE_DIM, 16, 128])
def test_absorb_q_same_bits_from_every_tile(rng, dtype, out_bytes, rope_dim, activations):
    weight = first_heads(make_absorb_weight(rng), HEADS)
    q = random_q(TOKENS, HEADS, dtype, HEAD_DIM + rope_dim)
    out_scale = torch.tensor([0.03], device="cuda") if out_bytes == 1 else None
    arguments = q[..., :HEAD_DIM], *weight, q[..., HEAD_DIM:], out_scale
    want = [reference_absorb_q(*arguments, activations=activations)]
    call = lambda: [OPS.absorb_q(*arguments, **ACTIVATIONS[activations])]  # noqa: E731
    same_from_every_tile(runnable(Op.absorb_q, out_bytes, terms_of(dtype, activations)), call, want)


@each_activations
@pytest.mark.parametrize("out_bytes", [2, 1])
def test_v_up_same_bits_from_every_tile(rng, dtype, out_bytes, activations):
    weight = first_heads(make_v_weight(rng), HEADS)
    o_latent, options = random_q(TOKENS, HEADS, dtype, LATENT), ACTIVATIONS[activations]
    v, _, val, scale = reference_v_all(o_latent, weight, torch.ones(1, device="cuda"), activations)
    calls = {
        2: lambda: [OPS.v_up(o_latent, *weight, **options)],
        1: lambda: OPS.v_up_quantized(o_latent, *weight, **options),
    }
    want = {2: [v], 1: [val.flatten(1), scale.squeeze(-1)]}
    same_from_every_tile(runnable(Op.v_up, out_bytes, terms_of(dtype, activations)), calls[out_bytes], want[out_bytes])


@each_activations
def test_v_up_same_bits_where_a_cta_fills_its_stages_again(rng, activations):
    weight, tokens = make_v_weight(rng), 200  # as many heads as an H100 has SMs, nearly: 4 row tiles of 64 a CTA
    o_latent, options = random_q(tokens, len(weight[0]), torch.bfloat16, LATENT), ACTIVATIONS[activations]
    call = lambda: [OPS.v_up(o_latent, *weight, **options)]  # noqa: E731
    with forced_tile("v_up_kloop"):
        want = call()
    same_from_every_tile(runnable(Op.v_up, 2, terms_of(torch.bfloat16, activations)), call, want)


def test_bmm_same_bits_from_every_tile(rng):
    weight = first_heads(make_absorb_weight(rng), HEADS)
    q_val, q_scale = OPS.quantize_q_nope(random_q(TOKENS, HEADS))
    want = [reference.bmm(q_val, q_scale, *weight, m=TOKENS, product=reference.tensor_core_product)]
    same_from_every_tile(runnable(Op.bmm, 2), lambda: [OPS.bmm(q_val, q_scale, *weight, m=TOKENS)], want)


def test_forced_tile_refuses_what_it_cannot_run(rng):
    q_val, q_scale = OPS.quantize_q_nope(random_q(3, 2, width=2 * HEAD_DIM))
    weight = torch.zeros(2, 128, 2 * HEAD_DIM, device="cuda").to(torch.float8_e4m3fn)
    with forced_tile("bmm_k128"), pytest.raises(RuntimeError, match="bmm_k128"):
        OPS.bmm(q_val, q_scale, weight, torch.ones(2, 1, 2, device="cuda"))
