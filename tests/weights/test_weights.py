"""AbsorbedWeights: no bit of the checkpoint is lost, and the module behaves as modules do."""

import copy
import doctest
import io

import pytest
import torch
from checkpoints import dequantized, head_rows, kv_b_proj
from helpers import E4M3, assert_same_bits, bits
from hypothesis import given
from hypothesis import strategies as st

from mla_fp8 import AbsorbedWeights, reference
from mla_fp8.weights import absorbed

BUFFERS = ("w_uk", "w_uk_scale", "w_uv", "w_uv_scale")

# Rounding to 3 fraction bits is off by 2^-4 of a value at most, 2.6e-2 in the mean square of normal data.
E4M3_FROBENIUS = (2.3e-2, 2.9e-2)
# Half a step of e4m3: 2^-4 of the value; below the normal range (2^-6) half of 2^-9. Times the scale, amax / 448.
E4M3_RELATIVE, E4M3_ABSOLUTE = 2.0**-4, 2.0**-10 / 448


def assert_same_weights(got: AbsorbedWeights, want: AbsorbedWeights) -> None:
    for name in BUFFERS:
        assert_same_bits(getattr(got, name), getattr(want, name), name)


def addresses(weights: AbsorbedWeights) -> list[int]:
    return [getattr(weights, name).data_ptr() for name in BUFFERS]


@given(
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 3),
    nope=st.sampled_from([128, 256]),
    v_dim=st.sampled_from([128, 384]),
    lora=st.sampled_from([128, 512]),
    copy_w_uv=st.booleans(),
)
def test_from_kv_b_proj_is_lossless(seed, heads, nope, v_dim, lora, copy_w_uv):
    weight, scale = kv_b_proj(torch.Generator().manual_seed(seed), heads, nope, v_dim, max(lora, 256))
    weight, scale = weight[:, :lora], scale[:, : lora // 128]
    weights = AbsorbedWeights.from_kv_b_proj(
        weight, scale, heads, qk_nope_head_dim=nope, v_head_dim=v_dim, copy_w_uv=copy_w_uv
    )
    want_uk, want_uv = head_rows(weight, heads, nope)
    assert_same_bits(weights.w_uk.mT, want_uk, "w_uk")
    assert_same_bits(weights.w_uv, want_uv, "w_uv")
    for got, want in zip(weights.dequantize(), head_rows(dequantized(weight, scale), heads, nope), strict=True):
        assert_same_bits(got, want, "dequantized")
    dims = (weights.num_heads, weights.qk_nope_head_dim, weights.v_head_dim, weights.kv_lora_rank)
    assert dims == (heads, nope, v_dim, lora)


def test_layouts_are_those_of_the_ops(rng):
    weight, scale = kv_b_proj(rng, heads=4)
    weights = AbsorbedWeights.from_kv_b_proj(weight, scale, 4)
    assert [list(getattr(weights, name).shape) for name in BUFFERS] == [
        [4, 512, 128],
        [4, 4, 1],
        [4, 128, 512],
        [4, 1, 4],
    ]
    assert weights.w_uk.stride() == (512 * 128, 128, 1)
    assert weights.w_uv.stride() == (2 * 128 * 512, 512, 1)
    assert weights.memory_bytes == 4 * 256 * 512 + 4 * 8 * 4
    assert "num_heads=4" in repr(weights)
    assert "device=cpu" in repr(weights)


def test_w_uv_is_a_view_unless_a_copy_is_asked_for(rng):
    weight, scale = kv_b_proj(rng)
    view = AbsorbedWeights.from_kv_b_proj(weight, scale, 2)
    owned = AbsorbedWeights.from_kv_b_proj(weight, scale, 2, copy_w_uv=True)
    assert view.w_uv.data_ptr() == weight[128:].data_ptr()
    assert owned.w_uv.untyped_storage().nbytes() == owned.w_uv.nbytes
    assert_same_weights(view, owned)
    weight.view(torch.uint8).zero_()
    assert not bits(view.w_uv).any()
    assert bits(view.w_uk).any() and bits(owned.w_uv).any()


@pytest.mark.parametrize("heads", [1, 2])
def test_scales_and_w_uk_never_alias_the_checkpoint(rng, heads):
    weight, scale = kv_b_proj(rng, heads, lora=128)
    weights = AbsorbedWeights.from_kv_b_proj(weight, scale, heads)
    checkpoint = {scale.untyped_storage().data_ptr(), weight.untyped_storage().data_ptr()}
    for name in ("w_uk", "w_uk_scale", "w_uv_scale"):
        assert getattr(weights, name).untyped_storage().data_ptr() not in checkpoint, name


@pytest.mark.parametrize("layout", ["odd address", "odd row stride", "transposed", "every other column"])
def test_a_weight_that_ops_could_not_read_is_copied(rng, layout):
    weight, scale = kv_b_proj(rng)
    rows, lora = weight.shape
    size, stride, offset = {
        "odd address": (rows * lora + 8, (lora, 1), 8),
        "odd row stride": (rows * (lora + 8), (lora + 8, 1), 0),
        "transposed": (rows * lora, (1, rows), 0),
        "every other column": (2 * rows * lora, (2 * lora, 2), 0),
    }[layout]
    odd = torch.zeros(size, dtype=torch.uint8).as_strided((rows, lora), stride, offset).copy_(bits(weight)).view(E4M3)
    weights = AbsorbedWeights.from_kv_b_proj(odd, scale, 2)
    assert weights.w_uv.is_contiguous() and weights.w_uv.data_ptr() % 16 == 0
    assert_same_weights(weights, AbsorbedWeights.from_kv_b_proj(weight, scale, 2))


@pytest.mark.parametrize("as_dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_exponent_scales_mean_powers_of_two(rng, as_dtype):
    weight, _ = kv_b_proj(rng, heads=32)  # 64 x 4 blocks: one for each code
    codes = torch.arange(256, dtype=torch.uint8).clamp(max=254).view(64, 4)
    weights = AbsorbedWeights.from_kv_b_proj(weight, codes.view(as_dtype), 32, scale_fmt="ue8m0")
    got = torch.cat([weights.w_uk_scale.mT, weights.w_uv_scale], dim=1).view(64, 4)
    want = 2.0 ** (codes.double() - 127)
    assert torch.equal(got.double(), want)


def test_from_bf16_quantizes_blocks(rng):
    weight = torch.randn(2 * 256, 512, generator=rng) * torch.tensor([1e-3, 1.0]).repeat_interleave(256)
    weight[128:256, 256:384] = 0
    weights = AbsorbedWeights.from_bf16(weight.bfloat16(), 2)
    exact = weight.bfloat16().float()
    got = torch.cat(weights.dequantize(), dim=1).view(512, 512)
    blocks = exact.view(4, 128, 4, 128).abs().amax((1, 3))
    want_scale = torch.maximum(blocks, torch.tensor(reference.AMAX_FLOOR)) / torch.tensor(448.0)
    got_scale = torch.cat([weights.w_uk_scale.mT, weights.w_uv_scale], dim=1).view(4, 4)
    assert torch.equal(got_scale, want_scale)
    largest = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)
    bound = exact.abs() * E4M3_RELATIVE * 1.01 + largest * E4M3_ABSOLUTE
    worst = ((got - exact).abs() - bound).argmax()
    assert ((got - exact).abs() <= bound).all(), f"at {divmod(int(worst), 512)}"
    error = (got - exact).norm() / exact.norm()
    assert E4M3_FROBENIUS[0] < error < E4M3_FROBENIUS[1]
    assert weights.w_uv.untyped_storage().nbytes() == weights.w_uv.nbytes


@pytest.mark.parametrize("given_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_from_bf16_returns_what_fp8_weights_say(rng, given_dtype):
    weight, scale = kv_b_proj(rng)
    bits(weight)[:, :] = torch.where(weight.float().isnan(), 0x7E, bits(weight))  # 448 in every block, no NaN
    exact = weight.to(given_dtype)  # powers of two as scales lose nothing
    weights = AbsorbedWeights.from_bf16(exact, 2)
    assert_same_weights(weights, AbsorbedWeights.from_kv_b_proj(weight, torch.ones_like(scale), 2))


CASTS = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "to(cpu, float16)": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.float64),
    "to(cpu)": lambda m: m.to("cpu"),
    "parent": lambda m: torch.nn.Sequential(m, torch.nn.Linear(2, 2)).to(torch.bfloat16)[0],
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_the_weights_alone(rng, cast):
    weights = AbsorbedWeights.from_kv_b_proj(*kv_b_proj(rng), 2)
    want, before = copy.deepcopy(weights), [weights.w_uk, weights.w_uk_scale, weights.w_uv, weights.w_uv_scale]
    got = CASTS[cast](weights)
    assert got is weights
    assert_same_weights(got, want)
    assert all(getattr(got, name) is buffer for name, buffer in zip(BUFFERS, before, strict=True))


def test_moves_to_another_device(rng):
    weights = AbsorbedWeights.from_kv_b_proj(*kv_b_proj(rng), 2).to("meta", torch.bfloat16)
    assert {(b.device.type, b.dtype) for b in weights.buffers()} == {("meta", E4M3), ("meta", torch.float32)}
    filled = weights.to_empty(device="cpu")
    other = AbsorbedWeights.from_kv_b_proj(*kv_b_proj(rng), 2)
    filled.load_state_dict(other.state_dict())
    assert_same_weights(filled, other)


@pytest.mark.gpu
def test_moves_to_the_gpu_and_back(rng):
    weights = AbsorbedWeights.from_kv_b_proj(*kv_b_proj(rng), 2)
    want = copy.deepcopy(weights)
    on_gpu = weights.to("cuda", torch.float16)
    assert on_gpu.w_uv.is_cuda and on_gpu.w_uv.is_contiguous()
    assert_same_weights(on_gpu.cpu(), want)


def test_state_dict_travels_through_a_file(rng):
    first, second = (torch.nn.ModuleDict({"mla": AbsorbedWeights.from_kv_b_proj(*kv_b_proj(rng), 2)}) for _ in "ab")
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    before = addresses(second["mla"])
    second.load_state_dict(torch.load(file, weights_only=True))
    assert_same_weights(second["mla"], first["mla"])
    assert addresses(second["mla"]) == before


def test_state_dict_of_another_dtype_is_refused(rng):
    weights = AbsorbedWeights.from_kv_b_proj(*kv_b_proj(rng), 2)
    want = copy.deepcopy(weights)
    state = {name: torch.zeros(value.shape) for name, value in weights.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"AbsorbedWeights: w_uk must be torch.float8_e4m3fn, got torch.float32"):
        weights.load_state_dict(state)
    assert_same_weights(weights, want)


def test_deepcopy_owns_only_its_own_memory(rng):
    weight, scale = kv_b_proj(rng)
    parent = torch.nn.ModuleDict({"mla": AbsorbedWeights.from_kv_b_proj(weight, scale, 2)})
    twin = copy.deepcopy(parent)["mla"]
    assert_same_weights(twin, parent["mla"])
    assert twin.w_uv.untyped_storage().nbytes() == twin.w_uv.nbytes
    assert not set(addresses(twin)) & set(addresses(parent["mla"]))
    weight.view(torch.uint8).zero_()
    assert bits(twin.w_uv).any()


@pytest.mark.parametrize("source", ["module", "fp8", "e8m0", "bf16"])
def test_update_keeps_every_address(rng, source):
    weights = AbsorbedWeights.from_kv_b_proj(*kv_b_proj(rng), 2)
    weight, scale = kv_b_proj(rng)
    arguments = {
        "module": (AbsorbedWeights.from_kv_b_proj(weight, scale, 2),),
        "fp8": (weight, scale),
        "e8m0": (weight, torch.full(scale.shape, 120, dtype=torch.uint8).view(torch.float8_e8m0fnu)),
        "bf16": (torch.randn(weight.shape, generator=rng).bfloat16(),),
    }[source]
    want = {
        "module": lambda other: other,
        "bf16": lambda plain: AbsorbedWeights.from_bf16(plain, 2),
    }.get(source, lambda *pair: AbsorbedWeights.from_kv_b_proj(*pair, 2))(*arguments)
    before = addresses(weights)
    assert weights.update_(*arguments) is weights
    assert addresses(weights) == before
    assert_same_weights(weights, want)


def test_update_from_its_own_checkpoint_tensor(rng):
    weight, scale = kv_b_proj(rng)
    weights = AbsorbedWeights.from_kv_b_proj(weight, scale, 2)
    fresh, fresh_scale = kv_b_proj(rng)
    weight.copy_(fresh)  # the serving engine refits its parameter in place; w_uv is a view of it
    weights.update_(weight, fresh_scale)
    assert_same_weights(weights, AbsorbedWeights.from_kv_b_proj(fresh, fresh_scale, 2))


def test_docstring_example_runs():
    assert doctest.testmod(absorbed) == (0, 2)
