"""Inputs of the GPU tests of absorb_q, v_up and bmm, in DeepSeek's shapes, and every output of v_up."""

import torch
from cases import ACTIVATIONS, OPS
from helpers import random_weight

from mla_fp8 import reference

HEAD_DIM = 128
LATENT = 512
ROPE_DIM = 64


def random_q(s, h, dtype=torch.bfloat16, width=HEAD_DIM):
    """Rows whose magnitudes differ by a few orders."""
    return (torch.randn(s, h, width, device="cuda") * torch.exp(2 * torch.randn(s, h, 1, device="cuda"))).to(dtype)


def make_absorb_weight(rng):
    """All 128 heads; also seeds what random_q draws."""
    torch.manual_seed(rng.initial_seed())
    return random_weight(rng, 128, LATENT, HEAD_DIM, "cuda")


def make_v_weight(rng):
    """As make_absorb_weight."""
    torch.manual_seed(rng.initial_seed())
    weight, scale = random_weight(rng, 128, 2 * HEAD_DIM, LATENT, "cuda")
    return weight[:, HEAD_DIM:], scale[:, 1:]  # views of kv_b_proj


def first_heads(weight, h):
    return tuple(tensor[:h] for tensor in weight)


def v_all(o_latent, weight, out_scale, activations="exact"):
    """Each of v_up's outputs, flattened to rows of heads."""
    options = ACTIVATIONS[activations]
    val, scale = OPS.v_up_quantized(o_latent, *weight, **options)
    return (
        OPS.v_up(o_latent, *weight, **options),
        OPS.v_up(o_latent, *weight, out_scale, **options),
        val.unflatten(1, (-1, HEAD_DIM)),
        scale.unsqueeze(-1),
    )


def reference_absorb_q(*arguments, activations):
    """The bits on Hopper."""
    return reference.absorb_q(*arguments, activations=activations, product=reference.tensor_core_product)


def reference_v_all(o_latent, weight, out_scale, activations):
    """The bits on Hopper, of sums that are made once."""
    sums = reference.tensor_core_product(*reference.keep_or_quantize(o_latent, activations), *weight)
    val, scale = reference.v_up_quantized(o_latent, *weight, product=lambda *_: sums)
    return (
        sums.to(o_latent.dtype),
        reference.to_fp8(sums, out_scale),
        val.unflatten(1, (-1, HEAD_DIM)),
        scale.unsqueeze(-1),
    )
