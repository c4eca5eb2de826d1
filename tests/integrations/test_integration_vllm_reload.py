"""The vLLM plugin when weights are loaded again: captured graphs read the old addresses, which hold the new numbers."""

import logging

import fake_vllm as fake
import pytest
import torch

from mla_fp8.integrations import vllm as plugin
from mla_fp8.integrations import vllm_weights

WARNS = "mla_fp8: reloaded kv_b_proj is quantized from vLLM's 16-bit weights, with loss: "
FAILS = "mla_fp8: its weights are NaN until a reload succeeds, this one failed: "
REQUANTIZED = 2.0**-4  # half an e4m3 ulp: where the numbers were e4m3 times another scale, all may fall midway


pytestmark = pytest.mark.usefixtures("fresh_vllm")


@pytest.fixture(params=[False, True], ids=["as loaded", "to powers of two"])
def layer(request, vllm, rng, log):
    """One that has been loaded, whose line has been said."""
    method = fake.BlockMethod(to_powers_of_two=request.param)
    made = fake.layer(vllm.attention, fake.projection(rng, method))
    made.__dict__["blocks"] = made.kv_b_proj.weight.clone(), made.kv_b_proj.weight_scale_inv.clone()
    fake.load(made)
    assert fake.runs_fp8(made)
    log.clear()
    return made


@pytest.fixture
def same(layer):
    """Checks that the weights are the objects of before, at their addresses, and no parameters."""

    def look():
        weights = [getattr(layer, name) for name in plugin.NAMES]
        return [id(weight) for weight in weights], [p.data_ptr() for w in weights for p in (w.weight, w.scale)]

    before = look()

    def check():
        assert fake.runs_fp8(layer) and look() == before

    return check


def loadable(weight, scale):
    return {"weight": weight, "weight_scale_inv": scale}


def held(layer):
    return torch.cat([getattr(layer, name).dequantize(torch.float64).flatten() for name in plugin.NAMES])


def test_vllm_reload_takes_new_numbers_at_old_addresses(layer, same, log, rng):
    for _ in range(2):
        blocks = fake.parts(rng)
        fake.reload(layer, loadable(*blocks))
        same()
        fake.assert_holds(layer, *blocks)
    assert log.messages == [] and plugin.layers[layer].blocks is None


def test_vllm_reload_of_all_as_at_first(layer, same, rng):
    blocks = fake.parts(rng)
    layer.kv_b_proj.weight.data, layer.kv_b_proj.weight_scale_inv.data = (part.clone() for part in blocks)
    fake.load(layer)
    same()
    fake.assert_holds(layer, *blocks)


def test_vllm_reload_without_kv_b_proj_keeps_the_numbers(layer, same, log):
    before = held(layer)
    fake.reload(layer, {})
    same()
    assert torch.equal(held(layer), before) and log.messages == []


def test_vllm_reload_by_small_steps_is_taken(layer, same, rng):
    """As of training: the numbers are closer to the old ones than a requantization is."""
    weight, scale = layer.blocks[0], layer.blocks[1] * 1.001
    fake.reload(layer, loadable(weight, scale))
    same()
    fake.assert_holds(layer, weight, scale)


BROKEN = "mla_fp8 failed: RuntimeError('no such luck')"


@pytest.mark.parametrize("step", [1.03, 3.0])  # less would leave vLLM's own bits, if it rounds to e4m3 once more
def test_vllm_reload_whose_blocks_cannot_be_read_is_quantized_from_vllms(monkeypatch, layer, same, log, step):
    def broken(*arguments, **options):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(vllm_weights, "read_blocks", broken)
    weight, scale = layer.blocks[0], layer.blocks[1] * step
    fake.reload(layer, loadable(weight, scale))
    same()
    want = torch.cat([part.flatten() for part in fake.exact(layer.kv_b_proj.weight, layer.kv_b_proj.weight_scale_inv)])
    assert (held(layer) - want).norm() <= REQUANTIZED * want.norm()
    assert log.messages == [WARNS + BROKEN]


def test_vllm_reload_of_other_numbers_than_the_blocks_is_quantized_from_vllms(layer, same, log, rng):
    method = layer.kv_b_proj.quant_method
    wide = torch.randn(fake.HEADS * 256, fake.RANK, generator=rng)
    method.dequantize = lambda projection, dtype: wide.to(dtype)
    fake.reload(layer, loadable(*fake.parts(rng)))
    same()
    got, want = layer.W_UV.dequantize(torch.float64), wide.view(fake.HEADS, 256, fake.RANK)[:, 128:].mT.double()
    assert (got - want).norm() <= REQUANTIZED * want.norm()
    assert len(log.messages) == 1 and log.messages[0].startswith(f"{WARNS}W_UK_T differs from kv_b_proj's blocks, ")


def test_vllm_reload_that_is_not_finite_shows(layer, same, log, rng):
    weight, scale = fake.parts(rng)
    scale[0, 0] = torch.nan
    fake.reload(layer, loadable(weight, scale))
    same()
    assert held(layer).isnan().all()
    assert log.messages[-1].startswith(FAILS) and log.records[-1].levelno == logging.ERROR
    blocks = fake.parts(rng)
    fake.reload(layer, loadable(*blocks))  # and the next one is as any
    same()
    fake.assert_holds(layer, *blocks)


def test_vllm_reload_that_vllm_breaks_off_keeps_the_weights(layer, same, log, rng):
    before, blocks = held(layer), fake.parts(rng)
    layer.__dict__["between"] = lambda: (_ for _ in ()).throw(MemoryError("vLLM's"))
    with pytest.raises(MemoryError, match="vLLM's"):
        fake.reload(layer, loadable(*blocks))
    same()
    assert torch.equal(held(layer), before) and plugin.layers[layer].blocks is None
    del layer.__dict__["between"]
    fake.reload(layer, loadable(*blocks))
    same()
    fake.assert_holds(layer, *blocks)


def test_vllm_reload_leaves_a_layer_alone_that_stepped_aside(vllm, log, rng):
    weight, scale = fake.parts(rng)
    bad = scale.clone()
    bad[0, 0] = torch.inf
    layer = fake.layer(vllm.attention, fake.Projection(fake.BlockMethod(), **loadable(weight, bad)))
    fake.load(layer)
    log.clear()
    before = [getattr(layer, name).data_ptr() for name in plugin.NAMES]
    fake.reload(layer, loadable(weight, scale))
    assert fake.is_stock(layer) and [getattr(layer, name).data_ptr() for name in plugin.NAMES] == before
    assert layer.W_UK_T.isfinite().all() and log.messages == []


def test_vllm_reload_of_quantized_16_bits(monkeypatch, log, rng):
    engine = fake.install_with_plugin(monkeypatch, "quantize")
    first, second = (torch.randn(fake.HEADS * 256, fake.RANK, generator=rng).bfloat16() for _ in range(2))
    layer = fake.layer(engine.attention, fake.Projection(fake.PlainMethod(), weight=first))
    fake.load(layer)
    log.clear()
    weight = layer.W_UK_T
    fake.reload(layer, {"weight": second})
    assert layer.W_UK_T is weight
    want = second.view(fake.HEADS, 256, fake.RANK)[:, :128].double()
    assert (weight.dequantize(torch.float64) - want).norm() <= REQUANTIZED * want.norm()
    assert log.messages == []
