"""What AbsorbedWeights refuses: the error names argument, rule and value."""

import copy
import re

import pytest
import torch
from checkpoints import kv_b_proj
from helpers import bits

from mla_fp8 import AbsorbedWeights


def rejects(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


def arguments(rng, **changes):
    weight, scale = kv_b_proj(rng)
    return {"weight": weight, "weight_scale_inv": scale, "num_heads": 2, **changes}


MULTIPLE = "must be a multiple of 128, for one scale covers a 128x128 block and no block may span two heads"
SUPPORTED = "(supported: 128, 256, 384, ..., 16384), got"
BAD_CALLS = {
    "bf16 weight": (
        lambda a: a | {"weight": a["weight"].bfloat16()},
        "weight must be torch.float8_e4m3fn, got torch.bfloat16",
    ),
    "rank": (lambda a: a | {"weight": a["weight"][None]}, "weight must have 2 dimensions, got [1, 512, 512]"),
    "rows": (
        lambda a: a | {"weight": a["weight"][:384]},
        "weight must have 2 * (128 + 128) = 512 rows, got [384, 512]",
    ),
    "heads": (lambda a: a | {"num_heads": 3}, "weight must have 3 * (128 + 128) = 768 rows, got [512, 512]"),
    "no heads": (lambda a: a | {"num_heads": 0}, "num_heads must be an integer >= 1, got 0"),
    "true heads": (lambda a: a | {"num_heads": True}, "num_heads must be an integer >= 1, got True"),
    "nope": (lambda a: a | {"qk_nope_head_dim": 192}, f"qk_nope_head_dim {MULTIPLE} {SUPPORTED} 192"),
    "v": (lambda a: a | {"v_head_dim": 64}, f"v_head_dim {MULTIPLE} {SUPPORTED} 64"),
    "zero v": (lambda a: a | {"v_head_dim": 0}, f"v_head_dim {MULTIPLE} {SUPPORTED} 0"),
    "lora": (lambda a: a | {"weight": a["weight"][:, :448]}, f"kv_lora_rank {MULTIPLE} {SUPPORTED} 448"),
    "scale blocks": (
        lambda a: a | {"weight_scale_inv": a["weight_scale_inv"].repeat_interleave(2, 1)},
        "weight_scale_inv must be [4, 4], one scale a 128x128 block of weight, got [4, 8]",
    ),
    "scale of one value": (
        lambda a: a | {"weight_scale_inv": torch.ones(())},
        "weight_scale_inv must be [4, 4], one scale a 128x128 block of weight, got []",
    ),
    "scale dtype": (
        lambda a: a | {"weight_scale_inv": a["weight_scale_inv"].double()},
        "weight_scale_inv must be float32, bfloat16, float16, float8_e8m0fnu, or uint8 exponents with scale_fmt "
        "'ue8m0', got torch.float64 with scale_fmt None",
    ),
    "uint8 without scale_fmt": (
        lambda a: a | {"weight_scale_inv": torch.full((4, 4), 127, dtype=torch.uint8)},
        "weight_scale_inv must be float32, bfloat16, float16, float8_e8m0fnu, or uint8 exponents with scale_fmt "
        "'ue8m0', got torch.uint8 with scale_fmt None",
    ),
    "scale device": (
        lambda a: a | {"weight_scale_inv": a["weight_scale_inv"].to("meta")},
        "weight_scale_inv must be on cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_from_kv_b_proj_rejects(rng, case):
    change, message = BAD_CALLS[case]
    with rejects("from_kv_b_proj: " + message):
        AbsorbedWeights.from_kv_b_proj(**change(arguments(rng)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "e8m0", "uint8"])
def test_from_kv_b_proj_rejects_scales_that_are_not_finite(rng, value):
    weight, scale = kv_b_proj(rng)
    if isinstance(value, str):
        scale = torch.full(scale.shape, 127, dtype=torch.uint8)
        scale[2, 1] = 255
        scale = scale.view(torch.float8_e8m0fnu) if value == "e8m0" else scale
    else:
        scale[2, 1] = value
    with rejects("from_kv_b_proj: weight_scale_inv must be finite, got NaN or Inf in block [[2, 1]]"):
        AbsorbedWeights.from_kv_b_proj(weight, scale, 2, scale_fmt="ue8m0")


@pytest.mark.parametrize("floor", [0.0, 1e-31, -1.0, float("inf"), float("nan")])
def test_from_bf16_rejects_amax_floor(floor):
    with rejects(f"from_bf16: amax_floor must be finite and >= 1e-30, got {floor}"):
        AbsorbedWeights.from_bf16(torch.zeros(256, 128), 1, amax_floor=floor)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_from_bf16_rejects_weights_that_are_not_finite(value):
    weight = torch.zeros(256, 256, dtype=torch.bfloat16)
    weight[130, 5] = value
    with rejects("from_bf16: weight must be finite, got NaN or Inf in block [[1, 0]]"):
        AbsorbedWeights.from_bf16(weight, 1)


def test_from_bf16_rejects_fp8(rng):
    with rejects("from_bf16: weight must be torch.bfloat16 or torch.float16 or torch.float32, got torch.float8_e4m3fn"):
        AbsorbedWeights.from_bf16(kv_b_proj(rng)[0], 2)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("w_uk", lambda t: t.half(), "w_uk must be torch.float8_e4m3fn, got torch.float16"),
        ("w_uk", lambda t: t[0], "w_uk must have 3 dimensions, got [512, 128]"),
        ("w_uk", lambda t: t[:0], "w_uk must have at least one head, got [0, 512, 128]"),
        ("w_uk_scale", lambda t: t.double(), "w_uk_scale must be torch.float32, got torch.float64"),
        ("w_uk_scale", lambda t: t.mT, "w_uk_scale must be [2, 4, 1], got [2, 1, 4]"),
        ("w_uv", lambda t: t[:1], "w_uv must be [2, 128, 512], got [1, 128, 512]"),
        ("w_uv", lambda t: t[:, :100], f"v_head_dim {MULTIPLE} {SUPPORTED} 100"),
        ("w_uv", lambda t: t.to("meta"), "w_uv must be on cpu as w_uk is, got meta"),
        ("w_uv_scale", lambda t: t[..., :3], "w_uv_scale must be [2, 1, 4], got [2, 1, 3]"),
    ],
)
def test_constructor_rejects(rng, name, change, message):
    buffers = dict(AbsorbedWeights.from_kv_b_proj(*kv_b_proj(rng), 2).named_buffers())
    with rejects("AbsorbedWeights: " + message):
        AbsorbedWeights(**buffers | {name: change(buffers[name])})


def test_update_rejects_and_writes_nothing(rng):
    weights = AbsorbedWeights.from_kv_b_proj(*kv_b_proj(rng), 2)
    want = copy.deepcopy(weights)
    weight, scale = kv_b_proj(rng)
    short, short_scale = kv_b_proj(rng, lora=256)
    nan_scale = scale.clone()
    nan_scale[3, 3] = float("nan")
    shapes = "[[2, 512, 128], [2, 128, 512]], got [[2, 256, 128], [2, 128, 256]]"
    for bad, message in (
        ((weight,), "weight must be torch.bfloat16 or torch.float16 or torch.float32, got torch.float8_e4m3fn"),
        ((weight[:256], scale[:2]), "weight must have 2 * (128 + 128) = 512 rows, got [256, 512]"),
        ((short, short_scale), f"source must make w_uk and w_uv of {shapes}"),
        ((weight, nan_scale), "weight_scale_inv must be finite, got NaN or Inf in block [[3, 3]]"),
        (({},), "source must be AbsorbedWeights or a Tensor, got dict"),
    ):
        with rejects("update_: " + message):
            weights.update_(*bad)
    for got, expected in zip(weights.buffers(), want.buffers(), strict=True):
        assert torch.equal(bits(got), bits(expected))
