"""Whatever torch has switched on around a call, weights are read to the CPU, and cut where the tensors are."""

import contextlib
import copy
import pickle

import pytest
import torch
from checkpoints import LAYER, SCALE, WEIGHT, config, kv_b_proj, write_checkpoint
from helpers import bits
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mla_fp8 import AbsorbedWeights, BlockFp8Weight, absorb_q, quantize_q_nope, v_up, v_up_quantized
from mla_fp8.__main__ import main
from mla_fp8.attention import attend_latents
from mla_fp8.cli.check import check
from mla_fp8.weights.file import write_weights

HEADS = 2


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def set_while(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextlib.contextmanager
def empty_weights():
    """As accelerate's init_empty_weights(include_buffers=True): buffers go to meta as they are registered."""
    register = torch.nn.Module.register_buffer

    def register_empty(module, name, buffer, persistent=True):
        register(module, name, buffer, persistent)
        module._buffers[name] = module._buffers[name].to("meta")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "register_buffer", register_empty)
        yield


CONTEXTS = {
    "meta": lambda: torch.device("meta"),
    "set_default_device": lambda: set_while(torch.set_default_device, "meta", None),
    "default float64": lambda: set_while(torch.set_default_dtype, torch.float64, torch.float32),
    "default bfloat16": lambda: set_while(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": Passing,
    "empty weights": empty_weights,
}
READING = CONTEXTS | {"fake": FakeTensorMode}
in_context = pytest.mark.parametrize("context", CONTEXTS)


@pytest.fixture
def pair(rng):
    weight, scale = kv_b_proj(rng)
    return torch.where(weight.float().isnan(), 0, weight.view(torch.uint8)).to(torch.uint8).view(weight.dtype), scale


@pytest.fixture
def want(pair):
    return AbsorbedWeights.from_kv_b_proj(*pair, HEADS)


@pytest.fixture
def directory(pair, tmp_path):
    return write_checkpoint(tmp_path / "m", dict(zip((WEIGHT, SCALE), pair, strict=True)), config())


def assert_same(got, want):
    for name, buffer in want.named_buffers():
        found = getattr(got, name)
        assert type(found) is torch.Tensor and found.device.type == "cpu" and not found.is_inference(), name
        assert found.dtype == buffer.dtype and torch.equal(bits(found), bits(buffer)), name
    got.update_(want)  # a refit outside of the context


@pytest.mark.parametrize("context", READING)
def test_from_safetensors_and_load_read_to_the_cpu(directory, want, tmp_path, context):
    write_weights(tmp_path / "one.safetensors", want.state_dict())
    with READING[context]():
        loaded = AbsorbedWeights.load(tmp_path / "one.safetensors")
        read = [AbsorbedWeights.from_safetensors(directory, LAYER, rank, 2) for rank in range(2)]
    assert_same(loaded, want)
    for name, buffer in want.named_buffers():
        assert torch.equal(torch.cat([bits(getattr(part, name)) for part in read]), bits(buffer)), name


@pytest.mark.parametrize("context", READING)
def test_bf16_checkpoint_is_quantized_on_the_cpu(tmp_path, rng, context):
    weight = torch.randn(HEADS * 256, 512, generator=rng).bfloat16()
    directory = write_checkpoint(tmp_path / "m", {WEIGHT: weight}, config())
    with READING[context]():
        got = AbsorbedWeights.from_safetensors(directory, LAYER, quantize_bf16=True)
        padded = AbsorbedWeights.from_safetensors(directory, LAYER, 3, 4, quantize_bf16=True)
    assert_same(got, AbsorbedWeights.from_bf16(weight, HEADS))
    assert not padded.dequantize()[0].any()


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_from_safetensors_reads_inside_of_a_transform(directory, want, transform):
    read = []

    def function(x):
        read.append(AbsorbedWeights.from_safetensors(directory, LAYER))
        return x.sum()

    transform(function)(torch.ones(3))
    assert_same(read[0], want)


@in_context
def test_cutting_stays_where_the_tensors_are(pair, want, rng, context):
    plain = torch.randn(HEADS * 256, 512, generator=rng)
    quantized = AbsorbedWeights.from_bf16(plain, HEADS)
    with CONTEXTS[context]():
        assert_same(AbsorbedWeights.from_kv_b_proj(*pair, HEADS), want)
        assert_same(AbsorbedWeights.from_kv_b_proj(*pair, HEADS, copy_w_uv=True), want)
        assert_same(AbsorbedWeights.from_bf16(plain, HEADS), quantized)


@in_context
def test_refits_and_reads_give_the_same_numbers(pair, want, context):
    target = AbsorbedWeights.from_bf16(torch.zeros(HEADS * 256, 512), HEADS)
    with CONTEXTS[context]():
        target.update_(*pair)
        dense = target.dequantize()
        block = BlockFp8Weight(target.w_uk, target.w_uk_scale).dequantize(torch.float32)
    assert_same(target, want)
    for got, expected in zip(dense, want.dequantize(), strict=True):
        assert torch.equal(got, expected) and got.dtype == torch.float32
    assert torch.equal(block.mT, want.dequantize()[0].mT.mT.transpose(1, 2))


@in_context
def test_ops_give_the_same_bits(want, rng, context):
    q_nope, o_latent = (torch.randn(3, HEADS, k, generator=rng).bfloat16() for k in (128, 512))
    q, cache = (torch.randn(1, n, *rest, generator=rng).bfloat16() for n, *rest in ((1, HEADS, 576), (8, 576)))
    block = BlockFp8Weight(want.w_uk, want.w_uk_scale)
    calls = (
        lambda: attend_latents(q, cache[..., :512], cache[..., 512:], scale=0.1),
        lambda: torch.bmm(q_nope.transpose(0, 1), block).contiguous(),
        lambda: quantize_q_nope(q_nope)[0],
        lambda: v_up_quantized(o_latent, want.w_uv, want.w_uv_scale)[1].contiguous(),
        lambda: pickle.loads(pickle.dumps(block)).dequantize().contiguous(),
        lambda: copy.deepcopy(want).w_uv,
        lambda: absorb_q(q_nope, want.w_uk, want.w_uk_scale),
        lambda: v_up(o_latent, want.w_uv, want.w_uv_scale, activations="fp8"),
    )
    for call in calls:
        expected = call()
        with CONTEXTS[context]():
            got = call()
        assert torch.equal(bits(got), bits(expected))


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_tensors_without_data_give_weights_without_data(fake):
    kind = FakeTensor if fake else torch.Tensor
    with FakeTensorMode() if fake else torch.device("meta"):
        plain = torch.empty(HEADS * 256, 512, dtype=torch.bfloat16)
        for weights in (
            AbsorbedWeights.from_kv_b_proj(plain.to(torch.float8_e4m3fn), torch.ones(4, 4), HEADS),
            AbsorbedWeights.from_bf16(plain, HEADS),
        ):
            assert all(type(buffer) is kind for buffer in weights.buffers())
            assert weights.w_uk.shape == (HEADS, 512, 128) and weights.w_uv.shape == (HEADS, 128, 512)
            assert weights.w_uk.device.type == ("cpu" if fake else "meta")


@pytest.mark.parametrize("context", READING)
def test_convert_writes_the_same_files(directory, tmp_path, context):
    arguments = ["convert", str(directory), "--layers", str(LAYER)]
    assert main([*arguments, str(tmp_path / "plain")]) == 0
    with READING[context]():
        assert main([*arguments, str(tmp_path / "out")]) == 0
    name = f"layer_{LAYER:03}.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("context", ["meta", "default float64", "inference_mode"])
def test_check_passes(context):
    with CONTEXTS[context]():
        assert not any(result.differences for result in check(["cpu"]))
