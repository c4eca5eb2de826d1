"""A module's path is found among a checkpoint's tensors whatever prefix either has; else the nearest are named."""

import pytest

from mla_fp8.weights.names import find_kv_b_proj

ATTENTION = "layers.3.self_attn.kv_b_proj"
NAMES = [f"model.layers.{i}.self_attn.{part}" for i in range(4) for part in ("kv_b_proj.weight", "o_proj.weight")]


@pytest.mark.parametrize(
    "prefix",
    ["model.", "", "_orig_mod.model.", "module.model.", "base_model.model.model.", "module._orig_mod.", "a.b."],
)
def test_find_kv_b_proj_whatever_the_wrapper(prefix):
    assert find_kv_b_proj(NAMES, 3, prefix + ATTENTION) == "model." + ATTENTION


@pytest.mark.parametrize(
    "wanted",
    ["model.layers._orig_mod.3.self_attn", "model.layers.3._orig_mod.self_attn", "model.layers.3.self_attn._orig_mod"],
)
def test_find_kv_b_proj_where_a_wrapper_is_within(wanted):
    assert find_kv_b_proj(NAMES, 3, wanted + ".kv_b_proj") == "model." + ATTENTION


@pytest.mark.parametrize("wanted", ["model.language_model.", "language_model.model.", "model.", "language_model."])
@pytest.mark.parametrize("there", ["language_model.model.", "model.language_model.", "model."])
def test_find_kv_b_proj_in_multimodal_models(wanted, there):
    names = [f"{there}{ATTENTION}.weight", "vision_tower.layers.3.attn.qkv.weight"]
    assert find_kv_b_proj(names, 3, wanted + ATTENTION) == there + ATTENTION


def test_find_kv_b_proj_fills_in_the_layer_and_takes_any_ending():
    assert find_kv_b_proj([f"{ATTENTION}.weight_packed"], 3, "model.layers.{layer}.self_attn.kv_b_proj") == ATTENTION


def test_find_kv_b_proj_takes_the_nearer_of_two():
    names = [*NAMES, f"model.mtp.{ATTENTION}.weight"]
    assert find_kv_b_proj(names, 3, ATTENTION) == f"model.{ATTENTION}"
    assert find_kv_b_proj(names, 3, f"_orig_mod.mtp.{ATTENTION}") == f"model.mtp.{ATTENTION}"


def test_find_kv_b_proj_tells_lists_within_a_layer_apart():
    names = [f"model.layers.3.self_attn.{i}.kv_b_proj.weight" for i in range(2)]
    assert find_kv_b_proj(names, 7, "layers.3.self_attn.1.kv_b_proj") == "model.layers.3.self_attn.1.kv_b_proj"


@pytest.mark.parametrize(
    "names, wanted, message",
    [
        (NAMES, "model.layers.4.self_attn.kv_b_proj", r"no model.layers.4.*; nearest: model.layers.\d.self_attn.kv"),
        (["model.layers.3.attn.wkv_b.weight"], f"model.{ATTENTION}", "nearest: model.layers.3.attn.wkv_b.weight"),
        ([f"a.{ATTENTION}.weight", f"b.{ATTENTION}.weight"], ATTENTION, rf"several layers.3.*: a.{ATTENTION}, b."),
        ([], ATTENTION, "nearest: no name like it"),
        (NAMES, "kv_b_proj", "no kv_b_proj.weight; nearest: model.layers"),
    ],
)  # fmt: skip
def test_find_kv_b_proj_names_the_nearest(names, wanted, message):
    with pytest.raises(LookupError, match=message):
        find_kv_b_proj(names, 3, wanted)
