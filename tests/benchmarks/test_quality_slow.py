"""What docs/accuracy.md says of the trained model, within bounds that follow from the power of the noise.

KL is about half the variance of a logit's noise, so it grows with the noise's power, and independent noises add.
"""

import math

import mla_models  # noqa: F401  skips this file where there is no transformers
import pytest

from benchmarks.quality import evaluate as quality
from benchmarks.quality import model as quality_model

pytestmark = pytest.mark.slow

OURS, OURS_FP8 = "block FP8 weights, exact activations: mla_fp8", "block FP8 weights and activations: mla_fp8"
BOTH = "per-tensor FP8 weights and activations"
WEIGHTS, TENSOR_WEIGHTS = "block FP8 weights", "per-tensor FP8 weights"
FP8_ALONE = {
    WEIGHTS: "block FP8 weights, all else fp32",
    OURS: "block FP8 weights, all else fp32",
    OURS_FP8: "block FP8 weights and activations, all else fp32",
    TENSOR_WEIGHTS: "per-tensor FP8 weights, all else fp32",
    BOTH: "per-tensor FP8 weights and activations, all else fp32",
}
ROUNDED_ONCE = "per-tensor FP8 weights, rounded once, all else fp32"
BLOCKS = 64  # KL to 4%, in a quarter of the record's time

# fp32 sums in another order: 2^-24 a rounding, some 10 in a row and logits up to some 10 apart move a logit by 1e-5.
FP32_KL = 1e-5**2 / 2
# The fault is an error of 1 in one of the model's 8 heads. e4m3 moves W_UV and o_latent by 2.6e-2 of themselves in all
# 8: a power of 8 * 2 * 2.6e-2^2 = 1.1%. W_UK and q_nope as much, times a softmax's spread of logits, say 2: 4.3%.
FP8_OVER_FAULT = 5.4e-2
# FP8's noise and bf16's are independent: together they cost their sum, up to a quarter for chance and second order.
ADDS = (0.8, 1.25)
# As many roundings of other tensors (absorbed for expanded), or on another grid (a scale a tensor for one a block).
AS_MANY = (0.5, 2.0)
# Of two candidates for top-1, the noise of whose difference is 2 sqrt(KL), the first changes where they are closer than
# that; fewer than one character in two has a second candidate within a nat.
FLIPS = 1.0
# Rounding twice, or twice as many factors, is at least twice the power but for unlike gains.
TWICE = 1.5
# Noise without a direction costs its KL on average; the rest is the text's chance.
CHANCE_SE = 4
# At 2^16, the other heads' largest weight is 3.5 steps of e4m3's subnormals (448 * 2^-16 / 2^-9) and a typical one, a
# quarter of it, less than one: an error of 1/3 instead of 1/27, 80 times the power, in three heads of four.
SPREAD_OVER_BLOCKS = 10


@pytest.fixture(scope="module")
def rows():
    recipe, corpus = quality_model.Recipe(), quality_model.standard_library()
    model, _ = quality_model.trained(recipe, corpus)
    return {(row.variant, row.octaves): row for row in quality.measure(model, corpus, recipe.context, BLOCKS)}


def of(rows, variant, octaves=0):
    return rows[variant, octaves]


def test_the_model_is_trained_and_uses_attention(rows):
    model = of(rows, "HF, fp32").nll
    assert model < of(rows, "counts of triples").nll < of(rows, "counts of pairs").nll
    # What sees one character cannot know more than the counts of two, but for what the held-out text is by chance.
    assert of(rows, "attention's output zero").nll > of(rows, "counts of pairs").nll - 0.05
    one, eight, thirty_two = (of(rows, f"seeing {n}").nll for n in ("1 character", "8 characters", "32 characters"))
    assert one > eight > thirty_two > model
    assert eight - model > 10 * of(rows, OURS_FP8).kl, "what is far away must be worth more than FP8 could cost"


def test_absorbing_in_fp32_changes_nothing(rows):
    row = of(rows, "absorbed, fp32")
    assert row.kl < FP32_KL and row.agreement > 0.9999


def test_absorbing_in_bf16_costs_what_bf16_costs(rows):
    low, high = AS_MANY
    assert low < of(rows, "absorbed, bf16").kl / of(rows, "HF, bf16").kl < high


@pytest.mark.parametrize("name", [WEIGHTS, OURS, OURS_FP8])
def test_fp8_costs_far_less_than_a_fault(rows, name):
    row, fault = of(rows, name), of(rows, "a fault: one head's values doubled")
    assert row.kl < FP8_OVER_FAULT * fault.kl
    assert abs(row.delta) < row.kl + CHANCE_SE * row.delta_se < fault.delta - CHANCE_SE * fault.delta_se


@pytest.mark.parametrize("name", FP8_ALONE)
def test_fp8_and_bf16_add(rows, name):
    low, high = ADDS
    assert low < of(rows, name).kl / (of(rows, "absorbed, bf16").kl + of(rows, FP8_ALONE[name]).kl) < high


@pytest.mark.parametrize("name", [WEIGHTS, OURS, OURS_FP8, TENSOR_WEIGHTS, BOTH])
def test_top_1_changes_where_candidates_are_close(rows, name):
    row = of(rows, name)
    assert 1 - row.agreement < FLIPS * math.sqrt(row.kl)


def test_a_scale_a_tensor_is_as_good_while_heads_are_alike(rows):
    low, high = AS_MANY
    assert low < of(rows, ROUNDED_ONCE).kl / of(rows, FP8_ALONE[WEIGHTS]).kl < high


@pytest.mark.parametrize(
    "more, less", [(OURS_FP8, WEIGHTS), (TENSOR_WEIGHTS, WEIGHTS)], ids=["activations", "requantized"]
)
def test_twice_the_rounding_is_twice_the_kl(rows, more, less):
    assert of(rows, FP8_ALONE[more]).kl > TWICE * of(rows, FP8_ALONE[less]).kl


def test_exact_activations_cost_no_more_than_bf16_products(rows):
    """From the checkpoint: beside them is only what all rows share, bf16 in the rest of the model."""
    own, plain, fp8 = of(rows, OURS), of(rows, WEIGHTS), of(rows, OURS_FP8)
    assert own.checkpoint_kl <= plain.checkpoint_kl + plain.checkpoint_kl_se
    assert fp8.checkpoint_kl > own.checkpoint_kl + 2 * fp8.checkpoint_kl_se


def test_blocks_lose_less_than_a_scale_a_tensor(rows):
    own, tensor = of(rows, OURS_FP8), of(rows, BOTH)
    assert own.kl + 2 * own.kl_se < tensor.kl - 2 * tensor.kl_se
    # From the checkpoint, dequantized blocks are bf16 noise only, and weights quantized again are not.
    bf16 = ADDS[1] * of(rows, "absorbed, bf16").kl
    assert of(rows, WEIGHTS).checkpoint_kl < bf16 < of(rows, TENSOR_WEIGHTS).checkpoint_kl


@pytest.mark.parametrize("octaves", quality.SPREADS[1:])
def test_the_spread_of_heads_costs_blocks_nothing(rows, octaves):
    for name in ("HF, bf16", OURS):
        plain, wide = of(rows, name), of(rows, name, octaves)
        assert (wide.nll, wide.kl, wide.agreement) == (plain.nll, plain.kl, plain.agreement)


@pytest.mark.parametrize("name", [TENSOR_WEIGHTS, BOTH])
def test_the_spread_of_heads_costs_a_scale_a_tensor(rows, name):
    assert of(rows, name, 16).kl > SPREAD_OVER_BLOCKS * of(rows, OURS, 16).kl
