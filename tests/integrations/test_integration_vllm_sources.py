"""The vLLM plugin against vLLM's own sources: what it asks of the class, and the class's own steps and products.

MLA_FP8_VLLM_SOURCE=a/vllm-0.26.0:a/vllm-0.33.0 python -m pytest tests/integrations/test_integration_vllm_sources.py
"""

import ast

import fake_vllm as fake
import pytest
import real_vllm
import torch
from helpers import assert_same_bits, randn

from mla_fp8 import v_up
from mla_fp8.integrations import vllm as plugin
from mla_fp8.integrations import vllm_engine
from mla_fp8.weights.block_fp8_weight import counts, reset_counts

# Where the sources multiply by one of the two: the file, below vllm/. Others want a real 16-bit tensor.
MULTIPLY = {"model_executor/layers/attention/mla_attention.py", "models/deepseek_v32/attention.py"}
MULTIPLY |= {"models/deepseek_v32/nvidia/attention.py"}  # where it was in 0.26.0
OTHER_CLASSES = ("models/kimi_k3/", "models/deepseek_v32/amd/", "v1/attention/backends/mla/amx_mla.py")

pytestmark = pytest.mark.skipif(not real_vllm.SOURCES, reason="MLA_FP8_VLLM_SOURCE names no folder with vLLM")


@pytest.fixture(params=real_vllm.SOURCES, ids=lambda path: path.name)
def source(request):
    return request.param


@pytest.fixture
def attention(monkeypatch, tmp_path, source):
    """vLLM's class, hooked."""
    fake.forget(monkeypatch)
    found = real_vllm.install(monkeypatch, tmp_path, source)
    monkeypatch.setenv(plugin.SWITCH, "1")
    plugin.register()
    assert found.__dict__["_mla_fp8_hooked"]
    return found


def test_vllm_source_has_what_the_plugin_uses(source):
    names, text = real_vllm.names_and_source(source)
    assert vllm_engine.lacking(names, text) == []


def test_vllm_source_reads_the_weights_only_where_they_are_multiplied_by(source):
    """A new reader of W_UK_T or W_UV shows here, before it dequantizes or wants an address."""
    root = source / "vllm"
    readers = set()
    for path in root.rglob("*.py"):
        text = path.read_text()
        if any(name in text for name in vllm_engine.NAMES):
            nodes = ast.walk(ast.parse(text))
            if any(isinstance(node, ast.Attribute) and node.attr in vllm_engine.NAMES for node in nodes):
                readers.add(path.relative_to(root).as_posix())
    assert {reader for reader in readers if not reader.startswith(OTHER_CLASSES)} <= MULTIPLY


def test_vllm_source_loads_multiplies_and_reloads(attention, rng):
    layer = fake.layer(attention, fake.projection(rng))
    weight, scale = layer.kv_b_proj.weight.clone(), layer.kv_b_proj.weight_scale_inv.clone()
    fake.load(layer)
    assert fake.runs_fp8(layer)
    fake.assert_holds(layer, weight, scale)
    before = [(id(getattr(layer, n)), getattr(layer, n).weight.data_ptr()) for n in vllm_engine.NAMES]

    latent = randn(rng, 5, fake.HEADS * fake.RANK, dtype=torch.bfloat16)
    out = torch.empty(5, fake.HEADS * 128, dtype=torch.bfloat16)
    reset_counts()
    layer._v_up_proj(latent, out)
    assert counts() == (1, 0)
    x = latent.view(5, fake.HEADS, fake.RANK)
    assert_same_bits(out.view(5, fake.HEADS, 128), v_up(x, layer.W_UV.weight, layer.W_UV.scale))

    blocks = fake.parts(rng)
    fake.reload(layer, {"weight": blocks[0], "weight_scale_inv": blocks[1]})
    assert fake.runs_fp8(layer)
    fake.assert_holds(layer, *blocks)
    assert [(id(getattr(layer, n)), getattr(layer, n).weight.data_ptr()) for n in vllm_engine.NAMES] == before
