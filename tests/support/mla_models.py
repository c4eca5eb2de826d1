"""Small random transformers models with latent attention, and the FP8 checkpoint of one."""

import contextlib

import pytest
import torch
from checkpoints import config, dequantized, write_checkpoint

from mla_fp8.formats import GROUP

transformers = pytest.importorskip("transformers", "5.15", "an optional extra, which `make test` installs")

HEADS, LAYERS, VOCAB = 4, 2, 257
SMALL = {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "n_shared_experts": 1, "n_routed_experts": 4,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 64, "vocab_size": VOCAB, "max_position_embeddings": 512,
    "initializer_range": 0.05, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
REAL_DIMS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
DENSE = {"first_k_dense_replace": LAYERS}  # a router may send a token elsewhere for the least noise
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}


def build(family="DeepseekV3", **options):
    """A model of fixed random weights in fp32, with DeepSeek-V3's head dims unless `options` say otherwise."""
    torch.manual_seed(0)
    model_config = getattr(transformers, family + "Config")(**{**SMALL, **REAL_DIMS, **options})
    return getattr(transformers, family + "ForCausalLM")(model_config).eval()


def prompt(batch=3, length=7, padding=3):
    """Token ids and their mask; the first sequence is padded on the left."""
    ids = torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=16, do_sample=False, **options)


@torch.no_grad()
def logits(model, inputs):
    """[B, S, vocabulary] fp32 of the tokens that are no padding, flattened to [N, vocabulary]."""
    return model(**inputs).logits.float()[inputs["attention_mask"].bool()]


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


def quantize_kv_b_proj(model, directory=None):
    """Rounds kv_b_proj to FP8 blocks, in place; the blocks, and the checkpoint of them in `directory`."""
    blocks = []
    for layer in attentions(model):
        weight = layer.kv_b_proj.weight.data
        amax = weight.abs().unflatten(0, (-1, GROUP)).unflatten(2, (-1, GROUP)).amax((1, 3))
        scale = amax / 448
        per_element = scale.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
        blocks.append(((weight / per_element).to(torch.float8_e4m3fn), scale))
        layer.kv_b_proj.weight.data.copy_(dequantized(*blocks[-1]))
    if directory is not None:
        names = [f"model.layers.{i}.self_attn.kv_b_proj.weight" for i in range(len(blocks))]
        values = {name: value for name, (value, _) in zip(names, blocks, strict=True)}
        scales = {f"{name}_scale_inv": scale for name, (_, scale) in zip(names, blocks, strict=True)}
        write_checkpoint(directory, {**values, **scales}, config(heads=HEADS))
    return blocks


@contextlib.contextmanager
def absorbed_calls(monkeypatch):
    """Collects the number of query tokens of every call that runs absorbed."""
    from mla_fp8.integrations import transformers as integration

    calls, attend = [], integration.attend_latents
    with monkeypatch.context() as patch:
        patch.setattr(integration, "attend_latents", lambda q, *a, **k: calls.append(q.shape[1]) or attend(q, *a, **k))
        yield calls
