"""The SGLang plugin against SGLang's own sources: hook registry, weight loader, MLA forward code, on a CPU.

MLA_FP8_SGLANG_SOURCE=a/sglang-0.5.17:a/sglang-0.5.23 python -m pytest tests/integrations/test_integration_sglang*.py
"""

import logging
import types

import fake_sglang as fake
import pytest
import real_sglang
import torch
from helpers import fail_at_worst, randn
from torch import nn

from mla_fp8.formats import dequantize_blocks
from mla_fp8.integrations import sglang as plugin
from mla_fp8.integrations import sglang_engine
from mla_fp8.weights import block_fp8_weight as uses

BF16_STEP = 2.0**-8
HEADS, NOPE, PE, V, RANK, HIDDEN = 4, 128, 64, 128, 512, 64

pytestmark = pytest.mark.skipif(not real_sglang.SOURCES, reason="MLA_FP8_SGLANG_SOURCE names no folder with SGLang")


@pytest.fixture(params=real_sglang.SOURCES, ids=lambda path: path.name)
def sglang(monkeypatch, request):
    """SGLang's modules; not yet hooked."""
    monkeypatch.setattr(plugin, "DEVICES", ("cuda", "cpu"))
    return types.SimpleNamespace(**real_sglang.install(monkeypatch, request.param))


@pytest.fixture
def hooked(monkeypatch, sglang, caplog):
    """What SGLang's own load_plugins makes of the entry point."""
    caplog.set_level(logging.INFO, logger=plugin.__name__)
    monkeypatch.setenv(plugin.SWITCH, "1")
    sglang.plugins.load_plugins()
    return sglang


def model_of(sglang, rng, layers=2, quantized=True):
    """A model whose loader and whose attention's forward methods are SGLang's."""

    class DeepseekV2AttentionMLA(nn.Module, sglang.forward_mla.DeepseekMLAForwardMixin):
        def __init__(self):
            super().__init__()
            self.num_local_heads, self.qk_nope_head_dim, self.qk_rope_head_dim = HEADS, NOPE, PE
            self.v_head_dim, self.kv_lora_rank, self.qk_head_dim = V, RANK, NOPE + PE
            self.w_kc = self.w_vc = self.w_scale_k = self.w_scale_v = self.w_kc_qrep = self.q_b_proj_qrep_weight = None
            self.w_scale, self.use_deep_gemm_bmm, self.q_lora_rank, self.rotary_emb = 1.0, False, None, None
            self.current_attention_backend, self.next_skip_topk, self.alt_stream = "fa3", None, None
            self.use_dsa, self.dcp_size, self.layer_id = False, 1, 0
            self.q = nn.Parameter(randn(rng, HEADS * (NOPE + PE), HIDDEN, dtype=torch.bfloat16), requires_grad=False)
            self.q_proj = lambda hidden: (hidden @ self.q.T,)
            self.kv_a_proj_with_mqa = lambda hidden: (torch.zeros(hidden.shape[0], RANK + PE, dtype=torch.bfloat16),)
            self.kv_a_layernorm = lambda latent: latent
            self.o_proj = lambda v: (v, None)
            self.attn_mqa = lambda q, *args, **kwargs: q.flatten(1)  # attention's output is its query
            self.kv_b_proj = nn.Module()
            weight, scale = fake.blocks(rng, HEADS * (NOPE + V), RANK)
            if quantized:
                self.kv_b_proj.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
                self.kv_b_proj.weight_scale_inv.format_ue8m0 = False
            else:
                weight = weight.bfloat16()
            self.kv_b_proj.weight = nn.Parameter(weight, requires_grad=False)

        def is_dcp_q_replicate_phase(self, forward_batch):
            return False

        is_dcp_mla_decode_phase = is_dcp_q_replicate_phase

    class DeepseekV3ForCausalLM(nn.Module, sglang.deepseek_weight_loader.DeepseekV2WeightLoaderMixin):
        config = types.SimpleNamespace(num_hidden_layers=layers, architectures=["DeepseekV3ForCausalLM"])
        quant_config = types.SimpleNamespace(weight_block_size=[128, 128], get_name=lambda: "fp8")

    model, inner = DeepseekV3ForCausalLM(), nn.Module()
    inner.layers = nn.ModuleList([nn.Module() for _ in range(layers)])
    for layer in inner.layers:
        layer.self_attn = DeepseekV2AttentionMLA()
    inner.start_layer, inner.end_layer, model.model = 0, layers, inner
    return model


def forward(sglang, monkeypatch, attention, hidden):
    """Both halves of SGLang's absorbed attention: q_nope's product, then attention's output's."""
    mode = types.SimpleNamespace(is_decode=lambda: True, is_target_verify=lambda: False, is_decode_or_idle=lambda: True)
    batch = types.SimpleNamespace(forward_mode=mode)
    with monkeypatch.context() as patched:  # 0.5.23's, for key parts of another rank
        patched.setattr(sglang.forward_mla, "prepare_kv_for_attention", lambda _, __, *k, **options: k, raising=False)
        prepared = attention.forward_absorb_prepare(None, hidden, batch, None)
    return prepared[2], attention.forward_absorb_core(*prepared)


def test_sglang_sources_are_hooked_by_their_own_registry(hooked, rng, caplog):
    assert hasattr(hooked.deepseek_weight_loader.DeepseekV2WeightLoaderMixin.post_load_weights, "__wrapped__")
    model = model_of(hooked, rng)
    model.post_load_weights()
    assert all(plugin.pair_in(layer.self_attn) for layer in model.model.layers)
    line = caplog.messages[-1]
    print(f"\n{line}")
    assert line == "mla_fp8: 2 of 2 MLA layers run w_kc and w_vc of DeepseekV3ForCausalLM from FP8, 1.6 MB freed"


def test_sglang_sources_unhooked_keep_their_weights(sglang, monkeypatch, rng):
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    sglang.plugins.load_plugins()
    method = sglang.deepseek_weight_loader.DeepseekV2WeightLoaderMixin.post_load_weights
    assert not hasattr(method, "__wrapped__") and sglang.hook_registry.HookRegistry._hooks == {}
    model = model_of(sglang, rng)
    model.post_load_weights()
    assert type(model.model.layers[0].self_attn.w_kc) is torch.Tensor


@pytest.mark.parametrize("s", [1, 5])
def test_sglang_sources_forward_runs_both_products(hooked, monkeypatch, rng, s):
    model = model_of(hooked, rng, layers=1)
    model.post_load_weights()
    attention = model.model.layers[0].self_attn
    hidden = randn(rng, s, HIDDEN, dtype=torch.bfloat16)
    uses.reset_counts()
    q_latent, v = forward(hooked, monkeypatch, attention, hidden)
    assert uses.counts() == (2, 0)
    kv_b_proj = dequantize_blocks(attention.kv_b_proj.weight, attention.kv_b_proj.weight_scale_inv)
    w_uk, w_uv = kv_b_proj.unflatten(0, (HEADS, NOPE + V)).split([NOPE, V], 1)
    q_nope = (hidden @ attention.q.T).view(s, HEADS, NOPE + PE)[..., :NOPE].double()
    for name, x, w, got in (
        ("q_latent", q_nope, w_uk, q_latent),
        ("v", q_latent.double(), w_uv.mT, v.unflatten(1, (HEADS, V))),
    ):
        want = torch.einsum("shk,hkn->shn", x, w)
        size = torch.einsum("shk,hkn->shn", x.abs(), w.abs())
        fail_at_worst((got - want).abs() > BF16_STEP * want.abs() + 2.0**-16 * size, got, want, name)


def test_sglang_sources_reload_keeps_addresses(hooked, rng):
    model = model_of(hooked, rng)
    model.post_load_weights()
    pairs = [plugin.pair_in(layer.self_attn) for layer in model.model.layers]
    fake.reload(model, rng)
    model.post_load_weights()
    model.post_load_weights(weight_names=["model.layers.1.self_attn.kv_b_proj.weight"])
    for layer, pair in zip(model.model.layers, pairs, strict=True):
        attention = layer.self_attn
        assert attention.w_kc is pair[0] and attention.w_vc is pair[1]
        want = fake.dequantized(attention.kv_b_proj.weight, attention.kv_b_proj.weight_scale_inv)
        assert torch.equal(attention.w_kc.dequantize(), want.unflatten(0, (HEADS, NOPE + V))[:, :NOPE])


def test_sglang_sources_draft_layer(hooked, rng):
    model = model_of(hooked, rng, layers=1)
    model.model.decoder = model.model.layers[0]
    model.post_load_weights(is_nextn=True)
    assert plugin.pair_in(model.model.decoder.self_attn)


def test_sglang_sources_deep_gemm_mode_steps_aside(hooked, rng, caplog, monkeypatch):
    loader = hooked.deepseek_weight_loader
    wrapper = types.SimpleNamespace(ENABLE_JIT_DEEPGEMM=True, DEEPGEMM_BLACKWELL=False)
    monkeypatch.setattr(loader, "deep_gemm_wrapper", wrapper)
    monkeypatch.setattr(loader, "get_bool_env_var", lambda name, default: True, raising=False)  # 0.5.17's
    envs = types.SimpleNamespace(SGLANG_USE_DEEPGEMM_BMM=types.SimpleNamespace(get=lambda: True))
    monkeypatch.setattr(loader, "envs", envs, raising=False)
    model = model_of(hooked, rng)
    model.post_load_weights()
    attention = model.model.layers[0].self_attn
    assert attention.use_deep_gemm_bmm and attention.w_kc.dtype == torch.float8_e4m3fn
    assert type(attention.w_kc) is torch.Tensor and "SGLANG_USE_DEEPGEMM_BMM is on" in caplog.messages[-1]


def test_sglang_sources_bf16_checkpoint_steps_aside(hooked, rng, caplog):
    model = model_of(hooked, rng, quantized=False)
    model.post_load_weights()
    assert type(model.model.layers[0].self_attn.w_kc) is torch.Tensor
    assert "kv_b_proj.weight is torch.bfloat16, not FP8 in 128x128 blocks" in caplog.messages[-1]


def test_sglang_sources_offloader_steps_aside(hooked, rng, caplog):
    hooked.offloader.set_offloader(hooked.offloader.OffloaderV1(cpu_offload_max_bytes=0))
    model = model_of(hooked, rng)
    model.post_load_weights()
    assert type(model.model.layers[0].self_attn.w_kc) is torch.Tensor
    assert caplog.messages[-1].endswith("no weight may be offloaded (--cpu-offload-gb), got OffloaderV1")


def test_sglang_sources_have_the_names_that_the_rules_ask(sglang):
    assert sglang_engine.why_not() is None
    imported = vars(sglang.deepseek_weight_loader)
    assert {"_is_cuda", "_is_hip", "_is_npu", "_is_musa", "_is_xpu", "_is_fp8_fnuz"} <= {*imported}
    assert "_ENABLE_DSA_Q8KV8_BORN_FP8_Q" in vars(sglang.forward_mla)
    context = (sglang.source / "sglang/srt/runtime_context.py").read_text()
    assert "def get_lora()" in context and "def get_model()" in context
