"""What an enabled layer holds follows kv_b_proj: loaded, trained, replaced, switched; never stale without a word."""

import copy
import warnings

import mla_models as models
import pytest
import torch
from test_integration_transformers import ALL_ABSORBED, BF16_LOGITS, FP8_LOGITS, relative_error
from torch import nn
from transformers import StaticCache

from mla_fp8.integrations.transformers import enable, refresh

WAYS = {"fp8": FP8_LOGITS, "unquantized": BF16_LOGITS}
each_way = pytest.mark.parametrize("weights", WAYS)


def new_weights():
    """A state_dict in fp32 of other weights; all but kv_b_proj's are those of `models.build`."""
    state = models.build(**models.DENSE).state_dict()
    generator = torch.Generator().manual_seed(7)
    for name, weight in state.items():
        if "kv_b_proj" in name:
            state[name] = torch.randn(weight.shape, generator=generator).mul_(0.1).bfloat16().float()
    return state


def load(model, state):
    model.load_state_dict(state)


def assign(model, state):
    model.load_state_dict({name: weight.bfloat16() for name, weight in state.items()}, assign=True)


def load_one_module(model, state):
    for index, layer in enumerate(models.attentions(model)):
        layer.kv_b_proj.load_state_dict({"weight": state[f"model.layers.{index}.self_attn.kv_b_proj.weight"]})


def each_weight(model, state):
    for index, layer in enumerate(models.attentions(model)):
        yield layer.kv_b_proj, state[f"model.layers.{index}.self_attn.kv_b_proj.weight"].bfloat16()


@torch.no_grad()
def write(model, state):
    for module, weight in each_weight(model, state):
        module.weight.copy_(weight)


def point_elsewhere(model, state):
    for module, weight in each_weight(model, state):
        module.weight.data = weight


def replace(model, state):
    for module, weight in each_weight(model, state):
        module.weight = nn.Parameter(weight)


def replace_module(model, state):
    for layer, (_, weight) in zip(models.attentions(model), list(each_weight(model, state)), strict=True):
        layer.kv_b_proj = nn.Linear(512, models.HEADS * 256, bias=False)
        layer.kv_b_proj.weight = nn.Parameter(weight)


def train(model, state):
    """A step of SGD that ends at the new weights."""
    parameters = [module.weight for module, _ in each_weight(model, state)]
    for module, weight in each_weight(model, state):
        module.weight.grad = module.weight.detach() - weight
    torch.optim.SGD(parameters, lr=1.0).step()


def write_uncounted(model, state):
    for module, weight in each_weight(model, state):
        module.weight.data.copy_(weight)
    refresh(model)


CHANGES = [load, assign, load_one_module, write, point_elsewhere, replace, replace_module, train, write_uncounted]


@each_way
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_followed(inputs, monkeypatch, weights, change):
    exact, state = models.build(**models.DENSE), new_weights()
    model = copy.deepcopy(exact).bfloat16()
    enable(model, weights=weights, prefill_threshold=ALL_ABSORBED)
    before = models.logits(model, inputs)
    change(model, state)
    exact.load_state_dict(model.state_dict())
    want = models.logits(exact, inputs)
    assert relative_error(before, want) > 5 * FP8_LOGITS, "a change that changes nothing shows nothing"
    with models.absorbed_calls(monkeypatch) as calls:
        got = models.logits(model, inputs)
    assert relative_error(got, want) < WAYS[weights] and len(calls) == models.LAYERS


@each_way
def test_load_state_dict_reaches_compiled_code(weights):
    model, ids = models.build(**models.DENSE).bfloat16(), models.prompt(padding=0)["input_ids"]
    enable(model, weights=weights)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)

    def decode(run):
        cache = StaticCache(model.config, max_cache_len=9)
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache)
            return run(ids[:, 6:], past_key_values=cache).logits

    before = decode(step)
    model.load_state_dict(new_weights())
    after = decode(step)
    assert torch.equal(after, decode(model)) and not torch.equal(after, before)


def test_fp8_weights_keep_their_addresses():
    model = models.build(**models.DENSE).bfloat16()
    enable(model)
    held = [buffer for layer in models.attentions(model) for buffer in layer.mla_fp8.buffers()]
    addresses, before = [b.data_ptr() for b in held], [b.float().clone() for b in held]
    model.load_state_dict(new_weights())
    assert [b.data_ptr() for layer in models.attentions(model) for b in layer.mla_fp8.buffers()] == addresses
    assert all(not torch.equal(b.float(), was) for b, was in zip(held, before, strict=True))


def test_a_followed_checkpoint_writes_to_no_file_or_tensor_of_others(tmp_path, inputs):
    model = models.build(**models.DENSE)
    models.quantize_kv_b_proj(model, tmp_path)
    model, files = model.bfloat16(), {p: p.read_bytes() for p in tmp_path.iterdir()}
    enable(model, checkpoint=tmp_path, prefill_threshold=ALL_ABSORBED)
    with pytest.warns(UserWarning, match=r"no longer that of enable\(checkpoint=...\): its layers") as said:
        model.load_state_dict(new_weights())
    assert len(said) == 1  # and not one a layer
    exact = models.build(**models.DENSE)
    exact.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    assert relative_error(models.logits(model, inputs), models.logits(exact, inputs)) < FP8_LOGITS
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_the_same_weights_keep_the_blocks_of_the_checkpoint(tmp_path, inputs):
    model = models.build(**models.DENSE)
    models.quantize_kv_b_proj(model, tmp_path)
    model = model.bfloat16()
    enable(model, checkpoint=tmp_path, prefill_threshold=ALL_ABSORBED)
    want = models.logits(model, inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*mla_fp8")
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(models.logits(model, inputs), want)
        assert torch.equal(models.logits(copy.deepcopy(model), inputs), want)
        model.half()
        models.logits(model, inputs)
    assert all(layer.mla_fp8.from_checkpoint for layer in models.attentions(model))


def test_weights_that_cannot_be_taken_run_expanded_with_their_name(inputs, monkeypatch):
    model = models.build(**models.DENSE).bfloat16()
    enable(model, prefill_threshold=ALL_ABSORBED)
    with torch.no_grad():
        models.attentions(model)[1].kv_b_proj.weight[3, 5] = float("inf")
    with (
        models.absorbed_calls(monkeypatch) as calls,
        pytest.warns(UserWarning, match="model.layers.1.self_attn: kv_b_proj changed and runs expanded"),
    ):
        models.logits(model, inputs)
    assert len(calls) == 1
    model.load_state_dict(new_weights())  # and absorbed again, as soon as it can be
    with models.absorbed_calls(monkeypatch) as calls:
        models.logits(model, inputs)
    assert len(calls) == models.LAYERS


@each_way
def test_enable_in_inference_mode_is_followed_outside(inputs, weights):
    exact, model = models.build(**models.DENSE), models.build(**models.DENSE).bfloat16()
    with torch.inference_mode():
        enable(model, weights=weights, prefill_threshold=ALL_ABSORBED)
    model.load_state_dict(new_weights())
    exact.load_state_dict(new_weights())
    assert relative_error(models.logits(model, inputs), models.logits(exact, inputs)) < WAYS[weights]


@each_way
def test_an_enabled_model_can_be_saved_whole(tmp_path, inputs, weights):
    model = models.build(**models.DENSE).bfloat16()
    enable(model, weights=weights, prefill_threshold=ALL_ABSORBED)
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(models.logits(twin, inputs), models.logits(model, inputs))


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"activations": "fp8"}, {"weights": "unquantized"}, {"checkpoint": True}], ids=str
)
def test_offloading_before_and_after_enable(tmp_path, inputs, monkeypatch, options, buffers):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = models.build(**models.DENSE)
    models.quantize_kv_b_proj(model, tmp_path)
    offloaded, model = copy.deepcopy(model).bfloat16(), model.bfloat16()
    options = {**options, **({"checkpoint": tmp_path} if "checkpoint" in options else {})}
    enable(model, prefill_threshold=ALL_ABSORBED, **options)
    want = models.logits(model, inputs)
    accelerate.cpu_offload(offloaded, execution_device="cpu", offload_buffers=buffers)
    enable(offloaded, prefill_threshold=ALL_ABSORBED, **options)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=buffers)
    for m in (model, offloaded):
        assert models.attentions(m)[0].kv_b_proj.weight.is_meta
        with models.absorbed_calls(monkeypatch) as calls:
            assert torch.equal(models.logits(m, inputs), want)
        assert len(calls) == models.LAYERS
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(models.logits(model, inputs), want)
