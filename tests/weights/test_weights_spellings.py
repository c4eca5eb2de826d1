"""Every spelling of 128x128 block scales that public checkpoints have: loaded without loss, or refused by name."""

import re

import pytest
import torch
from checkpoints import BASE, LAYER, SCALE, WEIGHT, config, dequantized, head_rows, kv_b_proj, write_checkpoint
from helpers import assert_same_bits

from mla_fp8 import AbsorbedWeights, v_up

HEADS, BLOCKS = 4, [8, 4]
WEIGHT_SCALE = BASE + ".weight_scale"
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [128, 128]}}},
}


@pytest.fixture
def weight(rng):
    return kv_b_proj(rng, heads=HEADS)[0]


@pytest.fixture
def scale(rng):
    """Numbers that every type of scale holds: powers of two that fp16 has too."""
    return 2.0 ** torch.randint(-10, 10, BLOCKS, generator=rng)


def exponents(scale):
    return (scale.log2() + 127).to(torch.uint8)


TYPES = {
    "float32": lambda scale: scale,
    "bfloat16": lambda scale: scale.bfloat16(),
    "float16": lambda scale: scale.half(),
    "float8_e8m0fnu": lambda scale: exponents(scale).view(torch.float8_e8m0fnu),
    "uint8": exponents,
}
SHAPES = ([8, 4], [1, 8, 4], [8, 4, 1], [8, 1, 4, 1], [1, 8, 1, 4])


def assert_loads(directory, weight, scale):
    want = head_rows(dequantized(weight, scale), HEADS, 128)
    for rank in range(2):
        got = AbsorbedWeights.from_safetensors(directory, LAYER, rank, 2).dequantize()
        for part, whole in zip(got, want, strict=True):
            assert_same_bits(part, whole[2 * rank : 2 * rank + 2], "dequantized")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", [SCALE, WEIGHT_SCALE], ids=["inv", "scale"])
def test_spelling_loads_without_loss(tmp_path, weight, scale, name, kind, shape):
    stored = TYPES[kind](scale).reshape(shape)
    model = config(heads=HEADS, scale_fmt="ue8m0" if kind == "uint8" else None)
    assert_loads(write_checkpoint(tmp_path / "m", {WEIGHT: weight, name: stored}, model), weight, scale)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_from_kv_b_proj_takes_the_same_spellings(weight, scale, kind, shape):
    stored = TYPES[kind](scale).reshape(shape)
    got = AbsorbedWeights.from_kv_b_proj(weight, stored, HEADS, scale_fmt="ue8m0").dequantize()
    for part, want in zip(got, head_rows(dequantized(weight, scale), HEADS, 128), strict=True):
        assert_same_bits(part, want, "dequantized")


def test_compressed_tensors_fp8_block(tmp_path, weight, rng):
    scale = torch.rand(BLOCKS, generator=rng).bfloat16()
    model = config(heads=HEADS) | {"quantization_config": COMPRESSED}
    directory = write_checkpoint(tmp_path / "m", {WEIGHT: weight, WEIGHT_SCALE: scale}, model)
    assert_loads(directory, weight, scale.float())


def test_both_names_with_the_same_numbers_load(tmp_path, weight, scale):
    tensors = {WEIGHT: weight, SCALE: scale, WEIGHT_SCALE: scale.bfloat16().reshape(8, 1, 4, 1)}
    assert_loads(write_checkpoint(tmp_path / "m", tensors, config(heads=HEADS)), weight, scale)


def test_zero_point_of_zeros_is_taken(tmp_path, weight, scale):
    tensors = {WEIGHT: weight, WEIGHT_SCALE: scale, BASE + ".weight_zero_point": torch.zeros(BLOCKS)}
    assert_loads(write_checkpoint(tmp_path / "m", tensors, config(heads=HEADS)), weight, scale)


def test_input_scale_beside_is_left_alone(tmp_path, weight, scale):
    tensors = {WEIGHT: weight, WEIGHT_SCALE: scale, BASE + ".input_scale": torch.ones(())}
    assert_loads(write_checkpoint(tmp_path / "m", tensors, config(heads=HEADS)), weight, scale)


REFUSED = {
    "one a tensor": (
        {WEIGHT_SCALE: torch.ones(())},
        f"{WEIGHT_SCALE} must have shape [8, 4], one scale a 128x128 block of weight, got F32 [], one a tensor",
    ),
    "one a tensor, 1-d": ({WEIGHT_SCALE: torch.ones(1)}, "got F32 [1], one a tensor"),
    "one a row": ({WEIGHT_SCALE: torch.ones(1024, 1).bfloat16()}, "got BF16 [1024, 1], one a row"),
    "packed int32": (
        {WEIGHT_SCALE: torch.ones(8, 1, dtype=torch.int32)},
        f"{WEIGHT_SCALE} must be float32, bfloat16, float16, float8_e8m0fnu, or uint8 exponents with scale_fmt "
        "'ue8m0', got I32 [8, 1] with scale_fmt None; packed int32 is an engine's own layout",
    ),
    "uint8 without scale_fmt": (
        {WEIGHT_SCALE: torch.full(BLOCKS, 127, dtype=torch.uint8)},
        "got U8 [8, 4] with scale_fmt None",
    ),
    "64x64 blocks": ({WEIGHT_SCALE: torch.ones(16, 8)}, "got F32 [16, 8]"),
    "1x128 groups": ({WEIGHT_SCALE: torch.ones(1024, 4)}, "got F32 [1024, 4]"),
    "transposed": ({SCALE: torch.ones(4, 8)}, f"{SCALE} must have shape [8, 4], one scale a 128x128 block"),
    "two that differ": (
        {SCALE: torch.ones(BLOCKS), WEIGHT_SCALE: torch.full(BLOCKS, 2.0)},
        f"{WEIGHT_SCALE} must hold the numbers of {SCALE}, as both are there, got others",
    ),
    "zero point": (
        {WEIGHT_SCALE: torch.ones(BLOCKS), BASE + ".weight_zero_point": torch.ones(BLOCKS)},
        f"{BASE}.weight_zero_point must be 0, for value * scale is the weight, got",
    ),
    "other scale": (
        {BASE + ".weight_scale_2": torch.ones(1)},
        f"{SCALE} or .weight_scale must be in the checkpoint beside {WEIGHT} of type F8_E4M3, "
        f"got {BASE}.weight_scale_2 F32 [1]",
    ),
    "not finite": ({WEIGHT_SCALE: torch.full(BLOCKS, float("inf"))}, f"{WEIGHT_SCALE} must be finite, got NaN or Inf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_scales_are_refused_by_name_type_and_shape(tmp_path, weight, case):
    tensors, message = REFUSED[case]
    directory = write_checkpoint(tmp_path / "m", {WEIGHT: weight, **tensors}, config(heads=HEADS))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        AbsorbedWeights.from_safetensors(directory, LAYER)
    assert str(raised.value).startswith("from_safetensors: ")


@pytest.mark.parametrize("quantize", [False, True])
def test_int8_weight_is_refused_without_a_hint_that_does_not_help(tmp_path, quantize):
    tensors = {WEIGHT: torch.ones(1024, 512, dtype=torch.int8), WEIGHT_SCALE: torch.ones(1024, 1)}
    directory = write_checkpoint(tmp_path / "m", tensors, config(heads=HEADS))
    message = f"{WEIGHT} must be float8_e4m3fn, or bfloat16, float16 or float32, got I8 [1024, 512]"
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        AbsorbedWeights.from_safetensors(directory, LAYER, quantize_bf16=quantize)
    assert "quantize_bf16" not in str(raised.value)


def test_packed_weight_is_named(tmp_path):
    packed = BASE + ".weight_packed"
    directory = write_checkpoint(tmp_path / "m", {packed: torch.ones(4, 4, dtype=torch.int32)}, config(heads=HEADS))
    with pytest.raises(ValueError, match=re.escape(f"there is no {WEIGHT}, but {packed} I32 [4, 4]")):
        AbsorbedWeights.from_safetensors(directory, LAYER)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("tp_size", [3, 5, 8])
def test_ranks_that_do_not_divide_the_heads_end_in_heads_of_zeros(tmp_path, rng, tp_size, quantize):
    if quantize:
        tensors = {WEIGHT: torch.randn(1024, 512, generator=rng).bfloat16()}
    else:
        tensors = dict(zip((WEIGHT, SCALE), kv_b_proj(rng, heads=HEADS), strict=True))
    directory = write_checkpoint(tmp_path / "m", tensors, config(heads=HEADS))
    load = lambda *rank: AbsorbedWeights.from_safetensors(directory, LAYER, *rank, quantize_bf16=quantize)  # noqa: E731
    ranks = [load(rank, tp_size) for rank in range(tp_size)]
    assert {rank.num_heads for rank in ranks} == {-(-HEADS // tp_size)}
    for i, want in enumerate(load().dequantize()):
        got = torch.cat([rank.dequantize()[i] for rank in ranks])
        assert_same_bits(got[:HEADS], want, "heads")
        assert len(got) > HEADS and not got[HEADS:].any()
    last = ranks[-1]
    o_latent = torch.randn(3, last.num_heads, 512, generator=rng).bfloat16()
    assert not v_up(o_latent, last.w_uv, last.w_uv_scale)[:, -1].any()
