"""docs/troubleshooting.md has the messages that wrong calls raise and that the library logs."""

import re
from pathlib import Path

import fake_sglang
import mla_models as models
import pytest
import torch
from block_weights import make
from cases import CASE
from checkpoints import LAYER, SCALE, WEIGHT, config, kv_b_proj, write_checkpoint
from faults import FAULTS
from helpers import random_weight
from test_block_fp8_weight import BAD_PARTS
from test_block_fp8_weight_kept import ADDRESSES, BAD_UPDATES, WRITES
from test_weights_errors import BAD_CALLS, arguments
from test_weights_spellings import HEADS, REFUSED

import mla_fp8
from mla_fp8 import AbsorbedWeights, BlockFp8Weight, jit
from mla_fp8 import config as tiles_config
from mla_fp8.integrations import sglang, transformers
from mla_fp8.weights import uses

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
OURS, OTHERS = PAGE.split("\n## Said by other programs\n")
ANYTHING = "…"


def messages(text: str) -> list[str]:
    return [line for block in re.findall(r"```text\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


PATTERNS = [re.compile(re.escape(message).replace(ANYTHING, ".*"), re.DOTALL) for message in messages(OURS)]


def said_by(call) -> str:
    with pytest.raises((RuntimeError, ValueError)) as error:
        call()
    lines = str(error.value).removeprefix("Error(s) in loading state_dict for AbsorbedWeights:\n\t").split("\n")
    return lines[0]


def raised_by_ops(rng):
    valid = {name: CASE[name].arguments(rng, 7, 3) for name in {fault.case for fault in FAULTS}}
    for fault in FAULTS:
        given = valid[fault.case]
        wrong = given | {fault.argument: fault.spoil(given.get(fault.argument))}
        yield said_by(lambda case=CASE[fault.case], wrong=wrong: case.functional(**wrong))
    for name in ("absorb_q-pe", "v_up", "bmm", "v_up_quantized"):
        case = CASE[name]
        given = case.arguments(rng, 7, 3)
        views, _ = case.out_views(case.call(given))
        first = next(iter(views))
        for wrong in (views[first].double(), views[first][:1].expand(views[first].shape), views[first].mT,
                      views[first].to("meta")):  # fmt: skip
            yield said_by(
                lambda case=case, given=given, views=views, wrong=wrong, first=first: case.out(
                    **given, **(views | {first: wrong})
                )
            )
    given = CASE["v_up"].arguments(rng, 7, 4)
    memory = given["o_latent"].view(-1)[: 7 * 4 * 128].view(7, 4, 128)
    yield said_by(lambda: CASE["v_up"].out(**given, v_out=memory))
    yield said_by(
        lambda: mla_fp8.quantize_q_nope(torch.zeros(1, 1, 128, dtype=torch.bfloat16).expand(2**31 - 1, 16384, 128))
    )
    between = torch.frombuffer(bytearray(257), dtype=torch.bfloat16, count=128, offset=1).view(1, 1, 128)
    yield said_by(lambda: mla_fp8.quantize_q_nope(between))
    yield said_by(lambda: mla_fp8.v_up(**given, activations="int4"))


def raised_by_weights(rng, directory):
    for change, _ in BAD_CALLS.values():
        yield said_by(lambda change=change: AbsorbedWeights.from_kv_b_proj(**change(arguments(rng))))
    weights = AbsorbedWeights.from_kv_b_proj(*kv_b_proj(rng), 2)
    yield said_by(lambda: AbsorbedWeights(weights.w_uk.half(), weights.w_uk_scale, weights.w_uv, weights.w_uv_scale))
    yield said_by(lambda: weights.load_state_dict({n: b.half() for n, b in weights.named_buffers()}))
    yield said_by(lambda: AbsorbedWeights.from_bf16(torch.full((256, 128), float("nan")), 1))
    tensors = dict(zip((WEIGHT, SCALE), kv_b_proj(rng), strict=True))
    for changes in ({"num_attention_heads": 4}, {"quantization_config": {"weight_block_size": [64, 64]}}):
        write_checkpoint(directory, tensors, config() | changes)
        yield said_by(lambda: AbsorbedWeights.from_safetensors(directory, LAYER))
    yield said_by(lambda: AbsorbedWeights.from_safetensors(directory, LAYER, tp_rank=3, tp_size=3))
    yield said_by(lambda: AbsorbedWeights.from_safetensors("deepseek-ai/DeepSeek-V3", LAYER))
    yield said_by(lambda: AbsorbedWeights.from_safetensors(directory, LAYER, name="layers.{layer}.kv_b"))
    weight = kv_b_proj(rng, heads=HEADS)[0]
    for wrong, _ in REFUSED.values():
        write_checkpoint(directory, {WEIGHT: weight, **wrong}, config(heads=HEADS))
        yield said_by(lambda: AbsorbedWeights.from_safetensors(directory, LAYER))
    next(directory.glob("*.safetensors")).unlink()
    yield said_by(lambda: AbsorbedWeights.from_safetensors(directory, LAYER))
    write_checkpoint(directory, tensors, config())
    yield said_by(lambda: AbsorbedWeights.load(next(directory.glob("*.safetensors"))))


def raised_by_a_block_weight(rng):
    for call in BAD_PARTS.values():
        yield said_by(lambda call=call: BlockFp8Weight(*call(*random_weight(rng, 2, 512, 128))))
    for call in BAD_UPDATES.values():
        yield said_by(lambda call=call: make(rng).update_(*call(*random_weight(rng, 3, 512, 128))))
    for call, error, _ in (*WRITES.values(), ADDRESSES["data_ptr"], ADDRESSES["dlpack"]):
        with pytest.raises(error) as raised:
            call(make(rng))
        yield str(raised.value)


def raised_by_enable(directory):
    def refused(family="DeepseekV3", change=lambda layer: None, **options):
        model = models.build(family).bfloat16()
        for layer in models.attentions(model):
            change(layer)
        return said_by(lambda: transformers.enable(model, **options))

    models.quantize_kv_b_proj(models.build(num_hidden_layers=1), directory)
    yield refused("Llama")
    yield refused(change=lambda layer: setattr(layer, "v_head_dim", 64))
    yield refused(change=lambda layer: setattr(layer, "indexer", None))
    yield refused(change=lambda layer: setattr(layer, "kv_b_proj", torch.nn.Module()))
    yield refused(change=lambda layer: layer.kv_b_proj.to("meta"))
    yield refused(change=lambda layer: layer.kv_b_proj.float())
    yield refused(change=lambda layer: layer.kv_b_proj.register_forward_hook(lambda *given: -given[-1]))
    yield refused(change=lambda layer: setattr(layer.config, "_output_attentions", True))
    yield refused(checkpoint=directory)


def load(engine, rng, damaged):
    model = engine.model(rng, layers=2)
    for i in damaged:
        model.model.layers[i].self_attn.kv_b_proj.base_layer = torch.nn.Module()
    model.post_load_weights()


def logged(monkeypatch, caplog):
    jit._announce(jit.source_directory() / "kernels" / "sm90" / "bmm.cu", "a directory")
    jit._write(Path("/dev/null/bmm.cubin"), b"")
    monkeypatch.setenv(sglang.SWITCH, "yes")
    sglang.register()
    monkeypatch.setenv(sglang.SWITCH, "1")
    sglang.register()
    engine = fake_sglang.install(monkeypatch)
    load(engine, torch.Generator(), damaged=())
    load(engine, torch.Generator(), damaged=(1,))
    load(engine, torch.Generator(), damaged=(0, 1))
    engine.loader._is_cuda = False
    load(engine, torch.Generator(), damaged=())
    monkeypatch.setattr(uses, "_said", set())
    weight = make(torch.Generator())
    torch.bmm(weight.mT, weight)
    weight.float()
    assert len(caplog.messages) == 9
    return caplog.messages


@pytest.fixture
def provoked(rng, tmp_path, monkeypatch, caplog):
    return [
        *raised_by_ops(rng),
        *raised_by_weights(rng, tmp_path / "m"),
        *raised_by_a_block_weight(rng),
        *raised_by_enable(tmp_path / "enable"),
        *logged(monkeypatch, caplog),
    ]


def test_every_provoked_message_is_on_the_page(provoked):
    unknown = {text for text in provoked if not any(known.search(text) for known in PATTERNS)}
    assert not unknown


def test_other_programs_words_are_as_quoted():
    quoted = "'_OpNamespace' 'mla_fp8' object has no attribute"
    assert any(quoted in message for message in messages(OTHERS))
    with pytest.raises(AttributeError, match=quoted):
        torch.ops.mla_fp8.x  # noqa: B018
    with pytest.raises(ValueError, match=r"forced_tile: symbol must be one of "), tiles_config.forced_tile("x"):
        pass
