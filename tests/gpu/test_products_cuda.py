"""What absorb_q, v_up, v_up_quantized and bmm do on a GPU beyond what the op tests ask of every device."""

import pytest
import strategies
import torch
from cases import ACTIVATIONS, OPS, each_activations
from helpers import (
    E4M3,
    GUARD,
    ROUNDING_FROBENIUS,
    assert_frobenius,
    assert_same_bits,
    assert_untouched_outside,
    randn,
    random_weight,
    strided,
)
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
    v_all,
)

from mla_fp8 import reference

pytestmark = pytest.mark.gpu

# Below, at and above every number of rows at which another tile or grid may be chosen.
BATCHES = (1, 2, 7, 16, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1000, 2049, 4097)
HEADS = (1, 3, 16, 128)


@pytest.mark.parametrize("h", HEADS)
@pytest.mark.parametrize("s", BATCHES)
def test_absorb_q_cuda_has_the_bits_of_the_three_steps(rng, s, h):
    absorb_weight = make_absorb_weight(rng)
    weight, q = first_heads(absorb_weight, h), random_q(s, h, width=HEAD_DIM + ROPE_DIM)
    q_val, q_scale = OPS.quantize_q_nope(q[..., :HEAD_DIM])
    three_steps = OPS.bmm(q_val, q_scale, *weight, m=s).transpose(0, 1)
    assert_same_bits(OPS.absorb_q(q[..., :HEAD_DIM], *weight, fp8_activations=True), three_steps, "q_latent")
    with_rope = OPS.absorb_q(q[..., :HEAD_DIM], *weight, q[..., HEAD_DIM:], fp8_activations=True)
    assert_same_bits(with_rope[..., :LATENT], three_steps, "q_latent beside q_pe")
    assert_same_bits(with_rope[..., LATENT:], q[..., HEAD_DIM:], "q_pe")


def test_absorb_q_cuda_scales_every_amax_as_quantize_q_nope_does(rng):
    """Every bf16 as a row's amax, subnormals, Inf and NaN too: one op divides, the other multiplies and corrects."""
    weight = make_absorb_weight(rng)
    amax = torch.arange(2**15, dtype=torch.int16, device="cuda").view(torch.bfloat16).view(-1, 128)
    q = amax.unsqueeze(-1) * torch.rand(HEAD_DIM, device="cuda").bfloat16()
    q[..., 5] = amax
    q_val, q_scale = OPS.quantize_q_nope(q)
    want = OPS.bmm(q_val, q_scale, *weight, m=len(q)).transpose(0, 1)
    assert_same_bits(OPS.absorb_q(q, *weight, fp8_activations=True), want)


@pytest.mark.parametrize("d,r", [(128, 128), (128, 256), (128, 384), (256, 128), (384, 512), (1536, 256)])
def test_absorb_q_cuda_has_the_bits_of_the_three_steps_at_other_extents(rng, d, r):
    weight, q = random_weight(rng, 3, r, d, "cuda"), random_q(200, 3, width=d)
    q_val, q_scale = OPS.quantize_q_nope(q, zero_pad=False)
    want = OPS.bmm(q_val, q_scale, *weight, m=200).transpose(0, 1)
    assert_same_bits(OPS.absorb_q(q, *weight, fp8_activations=True), want)


@each_activations
@pytest.mark.parametrize("s,h", [(1, 128), (2, 16), (7, 3), (63, 3), (65, 16), (129, 3), (257, 3), (1000, 2)])
def test_products_cuda_have_the_bits_of_the_reference(rng, dtype, s, h, activations):
    """The terms one after the other in one sum, the least first."""
    absorb_weight, v_weight = (first_heads(make(rng), h) for make in (make_absorb_weight, make_v_weight))
    q, o_latent = random_q(s, h, dtype, HEAD_DIM + ROPE_DIM), random_q(s, h, dtype, LATENT)
    arguments = q[..., :HEAD_DIM], *absorb_weight, q[..., HEAD_DIM:]
    want = reference_absorb_q(*arguments, activations=activations)
    assert_same_bits(OPS.absorb_q(*arguments, **ACTIVATIONS[activations]), want, "q")
    out_scale = torch.tensor(0.05, device="cuda")
    want = reference_v_all(o_latent, v_weight, out_scale, activations)
    for got, expected in zip(v_all(o_latent, v_weight, out_scale, activations), want, strict=True):
        assert_same_bits(got, expected, "v")


@each_activations
@pytest.mark.parametrize("kind", strategies.KINDS)
def test_products_cuda_have_the_bits_of_the_reference_for_rows_of_each_kind(rng, dtype, kind, activations):
    absorb_weight, v_weight = (first_heads(make(rng), 3) for make in (make_absorb_weight, make_v_weight))
    for op, wanted, weight, k in (
        (OPS.absorb_q, reference.absorb_q, absorb_weight, HEAD_DIM),
        (OPS.v_up, reference.v_up, v_weight, LATENT),
    ):
        x = strategies.rows_of_kind(kind, rng, 70 * 3, k, dtype).to(dtype).view(70, 3, k).cuda()
        want = wanted(x, *weight, activations=activations, product=reference.tensor_core_product)
        assert_same_bits(op(x, *weight, **ACTIVATIONS[activations]), want)


@each_activations
@pytest.mark.parametrize("d,r", [(128, 128), (256, 384), (384, 512), (1536, 256)])
def test_absorb_q_cuda_has_the_bits_of_the_reference_at_other_extents(rng, dtype, d, r, activations):
    weight, q = random_weight(rng, 3, r, d, "cuda"), random_q(70, 3, dtype, d)
    want = reference_absorb_q(q, *weight, activations=activations)
    assert_same_bits(OPS.absorb_q(q, *weight, **ACTIVATIONS[activations]), want)


def test_absorb_q_cuda_splits_beside_every_amax(rng, dtype):
    """Every number of the dtype as a row's amax, subnormals, Inf and NaN too."""
    w_uk, w_uk_scale = make_absorb_weight(rng)
    weight = w_uk[:, :HEAD_DIM], w_uk_scale[:, :1]
    amax = torch.arange(2**15, dtype=torch.int16, device="cuda").view(dtype).view(-1, 128)
    q = amax.unsqueeze(-1) * torch.rand(HEAD_DIM, device="cuda").to(dtype)
    q[..., 5] = amax
    assert_same_bits(OPS.absorb_q(q, *weight), reference_absorb_q(q, *weight, activations="exact"))


@each_activations
@pytest.mark.parametrize("e4m3", [False, True], ids=["same_dtype", "e4m3"])
def test_absorb_q_cuda_batch_invariant(rng, dtype, e4m3, activations):
    """A row's bits do not depend on S, H, its position, or the tile and grid that these choose."""
    absorb_weight = make_absorb_weight(rng)
    out_scale = torch.tensor([0.03], device="cuda") if e4m3 else None
    q = random_q(max(BATCHES), 128, dtype, HEAD_DIM + ROPE_DIM)
    q_nope, q_pe = q[..., :HEAD_DIM], q[..., HEAD_DIM:]
    options = ACTIVATIONS[activations]
    whole = OPS.absorb_q(q_nope, *absorb_weight, q_pe, out_scale, **options)
    for s in BATCHES:
        for h in HEADS:
            rows = slice(max(BATCHES) - s, None)
            got = OPS.absorb_q(q_nope[rows, :h], *first_heads(absorb_weight, h), q_pe[rows, :h], out_scale, **options)
            assert_same_bits(got, whole[rows, :h], f"S={s}, H={h}")


@each_activations
def test_v_up_cuda_batch_invariant(rng, dtype, activations):
    v_weight = make_v_weight(rng)
    out_scale = torch.tensor([0.03], device="cuda")
    o_latent = random_q(max(BATCHES), 128, dtype, LATENT)
    whole = v_all(o_latent, v_weight, out_scale, activations)
    for s in BATCHES:
        for h in HEADS:
            rows = slice(max(BATCHES) - s, None)
            got = v_all(o_latent[rows, :h], first_heads(v_weight, h), out_scale, activations)
            for one, want in zip(got, whole, strict=True):
                assert_same_bits(one, want[rows, :h], f"S={s}, H={h}")


def test_bmm_cuda_batch_invariant(rng):
    a = random_q(128, 700, torch.float32).to(E4M3)  # [B,M,K]
    a_scale = torch.rand(128, 700, 1, device="cuda")
    b, b_scale = random_weight(rng, 128, LATENT, HEAD_DIM, "cuda")
    whole = OPS.bmm(a, a_scale, b, b_scale)
    for m in (1, 7, 63, 64, 65, 129, 257, 512, 699):
        for heads in HEADS:
            some = slice(128 - heads, None)
            got = OPS.bmm(a[some, :, :], a_scale[some], b[some], b_scale[some], m=m)
            assert_same_bits(got, whole[some, :m], f"m={m}, B={heads}")


def test_v_up_cuda_equals_bmm(rng):
    """The same sums in the same order, for K of four blocks."""
    v_weight = make_v_weight(rng)
    o_latent = random_q(300, 128, width=LATENT)
    val, scale = OPS.quantize_q_nope(o_latent, m_alignment=1)
    want = OPS.bmm(val, scale, *v_weight).transpose(0, 1)
    assert_same_bits(OPS.v_up(o_latent, *v_weight, fp8_activations=True), want)


@pytest.mark.parametrize("k", [128, 512, 640, 7168])
@pytest.mark.parametrize("m", [1, 65, 300])
def test_bmm_cuda_matches_exact_product(rng, k, m):
    b, b_scale = random_weight(rng, 4, 384, k, "cuda")
    val, scale = reference.quantize(random_q(4, m, torch.float32, k))
    exact = reference.exact_product(val.transpose(0, 1), scale.transpose(0, 1), b, b_scale)
    got = OPS.bmm(val, scale.as_strided(scale.shape, scale.stride()), b, b_scale)
    assert_frobenius(got.transpose(0, 1), exact, ROUNDING_FROBENIUS)


@pytest.mark.parametrize("k", [128, 512, 640, 7168])
@pytest.mark.parametrize("m", [1, 65, 300])
def test_bmm_cuda_has_the_bits_of_the_reference(rng, k, m):
    b, b_scale = random_weight(rng, 4, 384, k, "cuda")
    val, scale = reference.quantize(random_q(4, m, torch.float32, k))
    want = reference.bmm(val, scale, b, b_scale, product=reference.tensor_core_product)
    assert_same_bits(OPS.bmm(val, scale, b, b_scale), want)


def codes_of_kind(kind, rng, rows, k):
    """[rows, K] e4m3."""
    x = randn(rng, rows, k)
    if kind == "any":
        code = torch.randint(0, 0x7F, (rows, k), generator=rng, dtype=torch.uint8)
        return (code | (x < 0).to(torch.uint8) << 7).view(E4M3)
    if kind == "outliers":
        x[:, ::37] *= 300
    return {"normal": x * 80, "positive": x.abs() * 80, "outliers": x, "tiny": x * 2.0**-8,
            "with_zeros": torch.exp2(x * 4) * x.sign() * (x.abs() > 0.3)}[kind].clamp(-448, 448).to(E4M3)  # fmt: skip


CODES = ("normal", "positive", "outliers", "any", "tiny", "with_zeros")


@pytest.mark.parametrize("b_kind", CODES)
@pytest.mark.parametrize("a_kind", CODES)
def test_bmm_cuda_cuts_the_bits_that_the_reference_cuts(rng, a_kind, b_kind):
    """The second block undoes the first with its products in another order, so that only what was cut is left."""
    order = torch.randperm(128, generator=rng)
    a, b = codes_of_kind(a_kind, rng, 300, 128), codes_of_kind(b_kind, rng, 128, 128)
    a = torch.cat([a.view(torch.uint8), a.view(torch.uint8)[:, order]], 1)[None].cuda().view(E4M3)
    b = torch.cat([b.view(torch.uint8), b.view(torch.uint8)[:, order] ^ 0x80], 1)[None].cuda().view(E4M3)
    a_scale, b_scale = torch.ones(1, 300, 2, device="cuda"), torch.ones(1, 1, 2, device="cuda")
    assert not reference.bmm(a, a_scale, b, b_scale).any()
    want = reference.bmm(a, a_scale, b, b_scale, product=reference.tensor_core_product)
    assert want.any() or a_kind == b_kind == "tiny"
    for m in (1, 16, 300):
        assert_same_bits(OPS.bmm(a, a_scale, b, b_scale, m=m), want[:, :m], f"m={m}")


def test_bmm_cuda_does_not_read_rows_from_m_on(rng):
    b, b_scale = random_weight(rng, 3, LATENT, HEAD_DIM, "cuda")
    val, scale = reference.quantize(random_q(3, 256, torch.float32))
    for m in (1, 63, 65, 255):
        poisoned_val, poisoned_scale = val.clone(), scale.clone()
        poisoned_val.view(torch.uint8)[:, m:] = 0x7F  # NaN
        poisoned_scale[:, m:] = float("nan")
        want = OPS.bmm(val[:, :m], scale[:, :m], b, b_scale)
        assert_same_bits(OPS.bmm(poisoned_val, poisoned_scale, b, b_scale, m=m), want)
        assert want.isfinite().all()


# Columns to the left of the output, extra columns of a row, elements before the first row.
@pytest.mark.parametrize("left,extra,offset", [(0, 0, 0), (8, 24, 16), (1, 3, 0), (0, 0, 1), (2, 6, 4)])
@pytest.mark.parametrize("e4m3", [False, True], ids=["same_dtype", "e4m3"])
@pytest.mark.parametrize("s", [1, 65, 300])
def test_absorb_q_cuda_writes_its_view_and_nothing_else(rng, dtype, s, e4m3, left, extra, offset):
    absorb_weight = make_absorb_weight(rng)
    h = 16
    out_scale = torch.tensor(0.05, device="cuda") if e4m3 else None
    q = random_q(s, h, dtype, HEAD_DIM + ROPE_DIM)
    arguments = (q[..., :HEAD_DIM], *first_heads(absorb_weight, h), q[..., HEAD_DIM:], out_scale)
    width, row = LATENT + ROPE_DIM, left + LATENT + ROPE_DIM + extra
    view, buffer = strided((s, h, width), (h * row, row, 1), GUARD + offset + left, E4M3 if e4m3 else dtype, "cuda")
    OPS.absorb_q.out(*arguments, q_out=view)
    assert_same_bits(view, OPS.absorb_q(*arguments), "q_out")
    assert_untouched_outside(buffer, view)


@pytest.mark.parametrize("row,offset", [(HEAD_DIM, 0), (HEAD_DIM + 16, 16), (HEAD_DIM + 1, 3)])
@pytest.mark.parametrize("s", [1, 65, 300])
def test_v_up_cuda_writes_its_views_and_nothing_else(rng, dtype, s, row, offset):
    v_weight = make_v_weight(rng)
    h = 16
    weight, out_scale = first_heads(v_weight, h), torch.tensor(0.05, device="cuda")
    o_latent = random_q(s, h, dtype, LATENT)
    for scale, out_dtype in ((None, dtype), (out_scale, E4M3)):
        view, buffer = strided((s, h, HEAD_DIM), (h * row, row, 1), GUARD + offset, out_dtype, "cuda")
        OPS.v_up.out(o_latent, *weight, scale, v_out=view)
        assert_same_bits(view, OPS.v_up(o_latent, *weight, scale), "v_out")
        assert_untouched_outside(buffer, view)
    val, val_buffer = strided((s, h * HEAD_DIM), (h * HEAD_DIM + offset, 1), GUARD + offset, E4M3, "cuda")
    scales, scale_buffer = strided((s, h), (3 * h, 3), GUARD, torch.float32, "cuda")
    OPS.v_up_quantized.out(o_latent, *weight, val_out=val, scale_out=scales)
    for got, want in zip((val, scales), OPS.v_up_quantized(o_latent, *weight), strict=True):
        assert_same_bits(got, want)
    assert_untouched_outside(val_buffer, val)
    assert_untouched_outside(scale_buffer, scales)


@each_activations
@pytest.mark.parametrize("view", ["q_nope", "q_pe", "o_latent"])
@pytest.mark.parametrize("start", [1, 2, 4, 8])
def test_products_cuda_reads_unaligned_views(rng, dtype, view, start, activations):
    absorb_weight, v_weight = make_absorb_weight(rng), make_v_weight(rng)
    s, h, options = 130, 16, ACTIVATIONS[activations]
    if view == "o_latent":
        o_latent = random_q(s, h, dtype, LATENT + 8)[..., start : start + LATENT]
        weight = first_heads(v_weight, h)
        want = OPS.v_up(o_latent.contiguous(), *weight, **options)
        assert_same_bits(OPS.v_up(o_latent, *weight, **options), want)
        return
    q = random_q(s, h, dtype, HEAD_DIM + ROPE_DIM + 8)[..., start:]
    q_nope, q_pe = q[..., :HEAD_DIM], q[..., HEAD_DIM : HEAD_DIM + ROPE_DIM]
    want = OPS.absorb_q(q_nope.contiguous(), *first_heads(absorb_weight, h), q_pe.contiguous(), **options)
    if view == "q_nope":
        q_pe = q_pe.contiguous()
    else:
        q_nope = q_nope.contiguous()
    assert_same_bits(OPS.absorb_q(q_nope, *first_heads(absorb_weight, h), q_pe, **options), want)


@each_activations
@pytest.mark.parametrize("s", [3, 70, 300])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_products_cuda_poison_stays_in_its_row(rng, dtype, s, poison, activations):
    absorb_weight, v_weight = make_absorb_weight(rng), make_v_weight(rng)
    h = 16
    out_scale = torch.tensor(0.05, device="cuda")
    q, o_latent = random_q(s, h, dtype), random_q(s, h, dtype, LATENT)
    rows = [(0, 3), (s - 1, 0), (s // 2, h - 1)]
    bad_q, bad_o = q.clone(), o_latent.clone()
    for i, (row, head) in enumerate(rows):
        bad_q[row, head, 41 * i] = poison
        bad_o[row, head, 200 * i] = poison
    weights, options = (first_heads(absorb_weight, h), first_heads(v_weight, h)), ACTIVATIONS[activations]
    clean, got = (
        [
            OPS.absorb_q(q_nope, *weights[0], **options),
            OPS.absorb_q(q_nope, *weights[0], None, out_scale, **options),
            *v_all(o, weights[1], out_scale, activations),
        ]
        for q_nope, o in ((q, o_latent), (bad_q, bad_o))
    )
    for one, want in zip(got, clean, strict=True):
        want = want.float()
        for row, head in rows:
            want[row, head] = float("nan")
        assert_same_bits(one.float(), want)


def test_products_cuda_rope_widths(rng, dtype):
    absorb_weight = make_absorb_weight(rng)
    h = 16
    for p in (16, 48, 64, 128, 256):
        for out_scale in (None, torch.tensor(0.05, device="cuda")):
            q_nope, q_pe = random_q(70, h, dtype), random_q(70, h, dtype, p)
            got = OPS.absorb_q(q_nope, *first_heads(absorb_weight, h), q_pe, out_scale)
            want = q_pe if out_scale is None else reference.to_fp8(q_pe, out_scale)
            assert_same_bits(got[..., LATENT:], want, f"P={p}")
            assert_same_bits(got[..., :LATENT], OPS.absorb_q(q_nope, *first_heads(absorb_weight, h), None, out_scale))


def test_absorb_q_cuda_offsets_pass_2_to_the_31(rng):
    absorb_weight = make_absorb_weight(rng)
    s, h = 29_200, 128
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB")
    q = torch.randn(s, h, HEAD_DIM + ROPE_DIM, device="cuda", dtype=torch.bfloat16)
    assert s * h * (LATENT + ROPE_DIM) > 2**31
    got = OPS.absorb_q(q[..., :HEAD_DIM], *absorb_weight, q[..., HEAD_DIM:])
    for rows in (slice(0, 64), slice(s // 2, s // 2 + 64), slice(s - 64, s)):
        want = OPS.absorb_q(q[rows, :, :HEAD_DIM], *absorb_weight, q[rows, :, HEAD_DIM:])
        assert_same_bits(got[rows], want)
