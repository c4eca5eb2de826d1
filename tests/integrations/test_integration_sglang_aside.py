"""The SGLang plugin steps aside: every reason, in one line, with SGLang's own weights in place."""

import logging
import types

import fake_sglang as fake
import pytest
import torch
from helpers import randn
from torch import nn

from mla_fp8 import devices
from mla_fp8.integrations import sglang as plugin
from mla_fp8.integrations import sglang_engine
from mla_fp8.integrations.engine import StepAside

MODEL = "DeepseekV3ForCausalLM"


@pytest.fixture(autouse=True)
def log(monkeypatch, caplog):
    monkeypatch.setenv(plugin.SWITCH, "1")
    caplog.set_level(logging.INFO, logger=plugin.__name__)
    return caplog


@pytest.fixture(params=fake.RELEASES)
def engine(monkeypatch, request, log):
    engine = fake.install(monkeypatch, request.param)
    log.clear()
    return engine


def assert_stock(model):
    for layer in model.model.layers:
        attention = layer.self_attn
        assert type(attention.w_kc) is torch.Tensor and type(attention.w_vc) is torch.Tensor
        assert attention.w_kc.shape[0] == attention.num_local_heads


def set_loader(**flags):
    return lambda engine: vars(engine.loader).update(flags)


def set_lora(**options):
    return lambda engine: vars(engine.context.lora).update(options)


LORA = "LoRA may be on kv_b_proj (--lora-target-modules can name modules without it)"
# What is set in the engine -> the line. Such a reason holds for all of its models.
ENGINE = {
    "the platform must be CUDA": set_loader(_is_cuda=False),
    "the platform must be CUDA, got _is_hip": set_loader(_is_hip=True),
    "the platform must be CUDA, got _is_npu": set_loader(_is_npu=True),
    "the platform must be CUDA, got _is_musa": set_loader(_is_musa=True),
    "the platform must be CUDA, got _is_xpu": set_loader(_is_xpu=True),
    "the platform must be CUDA, got _is_cpu": set_loader(_is_cpu=True),
    "SGLang requantizes kv_b_proj to UE8M0 scales": set_loader(
        should_deepgemm_weight_requant_ue8m0=lambda weight_block_size: weight_block_size == [128, 128]
    ),
    "no weight may be offloaded (--cpu-offload-gb), got OffloaderV1": (
        lambda engine: setattr(engine.offloader, "instance", type("OffloaderV1", (), {})())
    ),
    LORA: set_lora(enable_lora=True),
    f"{LORA} ": set_lora(lora_paths=["adapter"]),
    f"{LORA}  ": set_lora(enable_lora=True, lora_target_modules={"all"}),
    f"{LORA}   ": set_lora(enable_lora=True, lora_target_modules={"q_b_proj", "kv_b_proj"}),
    "--weight-cache-mode must be off, got client": lambda engine: vars(engine.context.model).update(
        weight_cache_mode="client"
    ),
    "SGLANG_ENABLE_DSA_Q8KV8_BORN_FP8_Q is on, whose kernel reads w_kc in bf16": (
        lambda engine: setattr(engine.forward, "_ENABLE_DSA_Q8KV8_BORN_FP8_Q", True)
    ),
    "this SGLang has no platform as known (AttributeError(\"module 'sglang.srt.models.deepseek_common."
    "deepseek_weight_loader' has no attribute '_is_cuda'\"))": lambda engine: delattr(engine.loader, "_is_cuda"),
    "this SGLang has no lora as known (AttributeError(\"module 'sglang.srt.runtime_context' has no attribute "
    "'get_lora'\"))": lambda engine: delattr(engine.context, "get_lora"),
    "this SGLang has no offloader as known (AssertionError())": (
        lambda engine: setattr(engine.offloader, "get_offloader", raising(AssertionError()))
    ),
    "this SGLang has no weight_cache as known (AttributeError(\"'types.SimpleNamespace' object has no attribute "
    "'weight_cache_mode'\"))": lambda engine: delattr(engine.context.model, "weight_cache_mode"),
}


def raising(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize("reason", ENGINE)
def test_sglang_steps_aside_for_the_engine(engine, rng, log, reason):
    ENGINE[reason](engine)
    model = engine.model(rng)
    model.post_load_weights()
    assert_stock(model)
    assert engine.mixin.calls == [None]  # as it was asked, and not layer by layer
    assert log.messages == [f"{MODEL}: no product from FP8: {reason.strip()}"]
    assert log.records[0].levelno == logging.WARNING


def test_sglang_lora_elsewhere_is_no_reason(engine, rng):
    set_lora(enable_lora=True, lora_target_modules={"q_b_proj"})(engine)
    model = engine.model(rng)
    model.post_load_weights()
    assert all(plugin.pair_in(layer.self_attn) for layer in model.model.layers)


def projection(**tensors):
    def change(attention):
        for name in [name for name, new in tensors.items() if new is None]:
            delattr(attention.kv_b_proj, name)
        for name, new in tensors.items():
            if new is not None:
                setattr(attention.kv_b_proj, name, nn.Parameter(new(attention), requires_grad=False))

    return change


def option(name, value):
    return lambda attention: setattr(attention, name, value)


def per_tensor(attention):
    projection(weight_scale_inv=None, weight_scale=lambda _: torch.ones(1))(attention)


def awq(attention):
    qweight = torch.zeros(attention.kv_b_proj.weight.shape, dtype=torch.int32)
    projection(weight=None, weight_scale_inv=None, qweight=lambda _: qweight)(attention)


def lora_layer(attention):
    attention.kv_b_proj.base_layer = nn.Module()


NO_BLOCKS = "not one [6, 4] a 128x128 block"


def line(reason, layers=2):
    """Of a model whose layers all stay as they are, for one reason."""
    ran = f"mla_fp8: 0 of {layers} MLA layers run w_kc and w_vc of {MODEL} from FP8, 0.0 MB freed"
    return f"{ran}; {layers} as before: {reason}"


# What is done to a layer -> the reason that it has SGLang's own weights.
LAYER = {
    "SGLANG_USE_DEEPGEMM_BMM is on, whose GEMMs want their own weights": option("deep_gemm", True),
    "kv_b_proj has a LoRA": lora_layer,
    "kv_b_proj has no weight to read": awq,
    "kv_b_proj.weight is torch.bfloat16, not FP8 in 128x128 blocks": projection(
        weight=lambda attention: attention.kv_b_proj.weight.bfloat16(), weight_scale_inv=None
    ),
    "kv_b_proj.weight is torch.int8, not FP8 in 128x128 blocks": projection(
        weight=lambda attention: attention.kv_b_proj.weight.to(torch.int8)
    ),
    f"kv_b_proj has scales {{'weight_scale': 'float32 [1]'}}, {NO_BLOCKS}": per_tensor,
    f"kv_b_proj has scales {{'weight_scale_inv': 'uint8 [6, 4]'}}, {NO_BLOCKS}": projection(
        weight_scale_inv=lambda _: torch.full((6, 4), 1, dtype=torch.uint8)
    ),
}


@pytest.mark.parametrize("reason", LAYER)
def test_sglang_steps_aside_for_a_layer(engine, rng, log, reason):
    model = engine.model(rng)
    for layer in model.model.layers:
        LAYER[reason](layer.self_attn)
    model.post_load_weights()
    assert_stock(model)
    assert log.messages == [line(reason)]


def test_sglang_steps_aside_for_other_dims(engine, rng, log):
    model = engine.model(rng, nope=192)
    model.post_load_weights()
    assert_stock(model)
    (message,) = log.messages
    assert "qk_nope_head_dim must be a multiple of 128" in message and message.endswith("got 192")


def test_sglang_steps_aside_for_another_attention(engine, rng, log):
    class OtherAttention(fake.DeepseekV2AttentionMLA):
        pass

    Other = type("KimiK3Attention", (nn.Module,), dict(vars(fake.DeepseekV2AttentionMLA)))
    Other.__init__ = lambda self, rng: vars(self).update(vars(fake.DeepseekV2AttentionMLA(rng)))
    model = engine.model(rng, attention=Other)
    model.post_load_weights()
    assert_stock(model)
    assert log.messages == [line("the attention is a KimiK3Attention, not a DeepseekV2AttentionMLA")]
    model = engine.model(rng, attention=OtherAttention)  # a subclass is one
    model.post_load_weights()
    assert plugin.pair_in(model.model.layers[0].self_attn)


def test_sglang_steps_aside_for_a_device(engine, rng, monkeypatch, log):
    monkeypatch.setattr(plugin, "DEVICES", ("cuda",))
    model = engine.model(rng)
    model.post_load_weights()
    assert_stock(model)
    assert log.messages == [line("kv_b_proj is on cpu, not on cuda")]


def test_sglang_steps_aside_for_blackwell(monkeypatch):
    """The reason is that of the ops, which know the GPUs that they have kernels for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    weight = torch.zeros(6 * 128, 512).to(torch.float8_e4m3fn)
    on_gpu = type("OnGpu", (torch.Tensor,), {"is_cuda": True, "device": torch.device("cuda:0")})
    projection = types.SimpleNamespace(weight=weight.as_subclass(on_gpu), weight_scale_inv=torch.ones(6, 4))
    attention = type("DeepseekV2AttentionMLA", (types.SimpleNamespace,), {})(
        use_deep_gemm_bmm=False, kv_b_proj=projection, num_local_heads=3, qk_nope_head_dim=128, v_head_dim=128,
        kv_lora_rank=512,
    )  # fmt: skip
    with pytest.raises(StepAside, match="compute capability must be 9.0, got 10.0"):
        plugin.pair_of(attention, torch.bfloat16)
    assert devices.why_not((9, 0)) is None


def test_sglang_self_test_finds_other_numbers(engine, rng, log, monkeypatch):
    monkeypatch.setattr(fake, "dequantized", lambda weight, scale: (weight.float() * scale.mean()).bfloat16())
    model = engine.model(rng)
    model.post_load_weights()
    assert_stock(model)
    assert log.messages == [line("w_kc differs from kv_b_proj's blocks, in a head by more than 0")]


def test_sglang_self_test_finds_nan(engine, rng, log):
    model = engine.model(rng, layers=1)
    model.model.layers[0].self_attn.kv_b_proj.weight.data.view(torch.uint8)[200, 0] = 0x7F
    model.post_load_weights()
    assert_stock(model)
    assert log.messages == [line("w_vc differs from kv_b_proj's blocks, in a head by more than 0", layers=1)]


def test_sglang_says_all_reasons_in_one_line(engine, rng, log):
    model = engine.model(rng, layers=5)
    for i in (1, 3):
        lora_layer(model.model.layers[i].self_attn)
    per_tensor(model.model.layers[4].self_attn)
    model.post_load_weights()
    (message,) = log.messages
    assert message == (
        f"mla_fp8: 2 of 5 MLA layers run w_kc and w_vc of {MODEL} from FP8, 1.2 MB freed; 2 as before: kv_b_proj has a "
        f"LoRA; 1 as before: kv_b_proj has scales {{'weight_scale': 'float32 [1]'}}, {NO_BLOCKS}"
    )


def test_sglang_a_failure_of_its_own_leaves_the_engine_up(engine, rng, log, monkeypatch):
    monkeypatch.setattr(plugin, "pair_of", raising(RuntimeError("a fault of ours")))
    model = engine.model(rng)
    model.post_load_weights()
    assert_stock(model)
    assert log.messages == [line("mla_fp8 failed: RuntimeError('a fault of ours')")]


def test_sglang_a_model_of_another_form_is_loaded_as_ever(engine, rng, log):
    model = engine.model(rng)
    plain = nn.Module()
    plain.layers, plain.start_layer = model.model.layers, 0
    model.model = plain
    with pytest.raises(AttributeError, match="end_layer"):  # SGLang's own, of the fake
        model.post_load_weights()
    assert engine.mixin.calls == [None]


def test_sglang_a_release_with_other_names_is_loaded_as_ever(monkeypatch, rng, log):
    def by_stem(self, is_nextn=False, weight_names=None):
        for i, layer in enumerate(self.model.layers):
            if weight_names is None or f"layer_{i}" in weight_names:
                fake.split(layer.self_attn)

    model = fake.install(monkeypatch, method=by_stem).model(rng)
    model.post_load_weights()
    assert_stock(model)


@pytest.mark.parametrize("lacking", [sglang_engine.LOADER, plugin.HOOKS])
def test_sglang_steps_aside_without_what_it_hooks(monkeypatch, log, lacking):
    fake.install(monkeypatch, without=lacking)
    (message,) = log.messages
    rule = f"have DeepseekV2WeightLoaderMixin.post_load_weights(is_nextn, weight_names) and {plugin.HOOKS}"
    assert message.startswith(f"register: sglang must {rule}, got sglang") and lacking in message
    assert message.endswith(": SGLang keeps its own weights")


def test_sglang_steps_aside_for_another_signature(monkeypatch, rng, log):
    engine = fake.install(monkeypatch, method=lambda self, weights: None)
    assert engine.registry.hooks == []
    (message,) = log.messages
    assert "its post_load_weights takes ['self', 'weights']" in message


def test_sglang_without_the_plugin_the_same_call_gives_the_same(engine, rng):
    """assert_stock and the fakes: SGLang's own products, beside ours."""
    model = engine.model(rng, layers=1)
    (layer,) = model.model.layers
    q_nope = randn(rng, 4, fake.HEADS, 128, dtype=torch.bfloat16)
    fake.split(layer.self_attn)
    stock = layer.self_attn(q_nope)[0]
    layer.self_attn.w_kc = layer.self_attn.w_vc = None
    model.post_load_weights()
    ours = layer.self_attn(q_nope)[0]
    assert torch.allclose(ours.float(), stock.float(), rtol=2.0**-7, atol=2.0**-7)
