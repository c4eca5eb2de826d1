"""What docs/accuracy.md says of the trained model, within bounds that were set before it was measured.

KL is about half the variance of a logit's noise, so it grows with the noise's power, and independent noises add.
"""

import math
import sys
from pathlib import Path

import mla_models  # noqa: F401  skips this file where there is no transformers
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import quality  # noqa: E402
import quality_model  # noqa: E402

pytestmark = pytest.mark.slow

OURS, BOTH = "block FP8 weights and activations: mla_fp8", "per-tensor FP8 weights and activations"
WEIGHTS, TENSOR_WEIGHTS = "block FP8 weights", "per-tensor FP8 weights"

# fp32 sums in another order: 2^-24 a rounding, some 10 in a row and logits up to some 10 apart move a logit by 1e-5.
FP32_KL = 1e-5**2 / 2
# e4m3 moves each of four factors a layer (W_UK, W_UV, q_nope, o_latent) by 2.6e-2 of itself: together 5% of attention's
# output, 0.3% of its power. A softmax hands on noise of q times the spread of its logits: twice, for 1.2%.
FP8_OF_ATTENTION = 1.2e-2
# Twice the number of equal, independent noises is twice the power; they are not quite equal, so the ratio is 1.3 to 3.
DOUBLED = (1.3, 3.0)
# In bf16 the absorbed way rounds other tensors than the expanded one, and about as many.
AS_MANY = (0.5, 2.0)
# Of two candidates for top-1, the noise of whose difference is 2 sqrt(KL), the first changes where they are closer than
# that; fewer than one character in two has a second candidate within a nat.
FLIPS = 1.0
# At 2^16, the other heads' largest weight is 3.5 steps of e4m3's subnormals (448 * 2^-16 / 2^-9) and a typical one, a
# quarter of it, less than one: an error of 1/3 instead of 1/27, 80 times the power, in three heads of four.
SPREAD_OVER_BLOCKS = 10


@pytest.fixture(scope="module")
def rows():
    recipe, corpus = quality_model.Recipe(), quality_model.standard_library()
    model, _ = quality_model.trained(recipe, corpus)
    return {(row.variant, row.octaves): row for row in quality.measure(model, corpus, recipe.context, quality.BLOCKS)}


def of(rows, variant, octaves=0):
    return rows[variant, octaves]


def worth(rows):
    """Nats per character that attention's output is worth."""
    return of(rows, "attention's output zero").nll - of(rows, "HF, fp32").nll


def test_the_model_is_trained_and_uses_attention(rows):
    model = of(rows, "HF, fp32").nll
    assert model < of(rows, "counts of 3 characters").nll < of(rows, "counts of 2 characters").nll
    # What sees one character cannot know more than the counts of two, but for what the held-out text is by chance.
    assert of(rows, "attention's output zero").nll > of(rows, "counts of 2 characters").nll - 0.05
    one, eight, thirty_two = (of(rows, f"seeing {n}").nll for n in ("1 character", "8 characters", "32 characters"))
    assert one > eight > thirty_two > model
    assert eight - model > worth(rows) * FP8_OF_ATTENTION, "FP8's noise may cost as much as all but the last characters"


def test_absorbing_in_fp32_changes_nothing(rows):
    row = of(rows, "absorbed, fp32")
    assert row.kl < FP32_KL and row.agreement > 0.9999


def test_absorbing_in_bf16_costs_what_bf16_costs(rows):
    low, high = AS_MANY
    assert low < of(rows, "absorbed, bf16").kl / of(rows, "HF, bf16").kl < high


def test_fp8_costs_a_hundredth_of_attention(rows):
    for name in (WEIGHTS, OURS):
        row = of(rows, name)
        assert of(rows, "HF, bf16").kl < row.kl < worth(rows) * FP8_OF_ATTENTION
        assert abs(row.delta) < worth(rows) * FP8_OF_ATTENTION
    fault = of(rows, "a fault: one head's values doubled")
    assert fault.kl > 2 * of(rows, OURS).kl and fault.delta > 2 * abs(of(rows, OURS).delta), "a fault would not show"


@pytest.mark.parametrize("name", [WEIGHTS, OURS, TENSOR_WEIGHTS, BOTH])
def test_top_1_changes_where_candidates_are_close(rows, name):
    row = of(rows, name)
    assert 1 - row.agreement < FLIPS * math.sqrt(row.kl)


@pytest.mark.parametrize("more, less", [(OURS, WEIGHTS), (TENSOR_WEIGHTS, WEIGHTS)], ids=["activations", "requantized"])
def test_twice_the_rounding_is_twice_the_kl(rows, more, less):
    low, high = DOUBLED
    assert low < of(rows, more).kl / of(rows, less).kl < high


def test_blocks_lose_less_than_a_scale_a_tensor(rows):
    own, tensor = of(rows, OURS), of(rows, BOTH)
    assert own.kl + 2 * own.kl_se < tensor.kl - 2 * tensor.kl_se
    # From the checkpoint, dequantized blocks are bf16 noise only, and weights quantized again are not.
    assert of(rows, WEIGHTS).checkpoint_kl < 2 * of(rows, "absorbed, bf16").kl < of(rows, TENSOR_WEIGHTS).checkpoint_kl


@pytest.mark.parametrize("octaves", quality.SPREADS[1:])
def test_the_spread_of_heads_costs_blocks_nothing(rows, octaves):
    for name in ("HF, bf16", OURS):
        plain, wide = of(rows, name), of(rows, name, octaves)
        assert (wide.nll, wide.kl, wide.agreement) == (plain.nll, plain.kl, plain.agreement)


@pytest.mark.parametrize("name", [TENSOR_WEIGHTS, BOTH])
def test_the_spread_of_heads_costs_a_scale_a_tensor(rows, name):
    assert of(rows, name, 16).kl > SPREAD_OVER_BLOCKS * of(rows, OURS, 16).kl
