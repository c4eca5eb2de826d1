"""The SGLang plugin: off unless asked for, the contract of what it replaces, and stepping aside."""

import doctest
import importlib.metadata
import logging
import sys

import fake_sglang as fake
import pytest
import torch
from helpers import assert_same_bits, fail_at_worst, laid_out, randn

from mla_fp8 import reference
from mla_fp8.integrations import sglang as plugin

E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 1, 128), (16, 1, 128), (3, 5, 128), (2, 256, 128), (2, 257, 512), (3, 7, 512), (2, 1025, 128)]
ONE_STEP = 1  # of e4m3's codes: a quotient and a product with a rounded reciprocal lie within 2 ulp of fp32
VIEWS = {
    "view of [S,H,K]": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "view of [S,H,K+64]": lambda x: laid_out(x, lambda h, s, k: ((k + 64, h * (k + 64), 1), 0)),  # as in q[S,H,192]
    "contiguous": lambda x: x.contiguous(),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test sees every log line, makes its own tables, and starts with the switch as users have it."""
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    monkeypatch.setattr(plugin, "tables", {})
    plugin.log_first.cache_clear()


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger=plugin.__name__)
    return caplog


@pytest.fixture
def switched_on(monkeypatch):
    monkeypatch.setenv(plugin.SWITCH, "1")


@pytest.fixture
def quantize(monkeypatch, switched_on):
    """The function as a module of SGLang calls it, after sglang's load_plugins."""
    caller, registry = fake.install(monkeypatch)
    plugin.register()
    registry.apply_hooks()
    return getattr(caller, plugin.FUNCTION)


def codes(x):
    """e4m3 as whole numbers in the order of the values, so that neighbours differ by one; NaN is far off."""
    code = x.view(torch.uint8).int()
    return torch.where(code > 127, -(code - 128), code)


def assert_untouched(caller, registry):
    registry.apply_hooks()
    assert getattr(caller, plugin.FUNCTION) is fake.masked_quantization and registry.hooks == []


def test_sglang_entry_point_is_register():
    (entry,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="mla_fp8")
    assert entry.load() is plugin.register


@pytest.mark.parametrize("switch", [None, "", "0"])
def test_sglang_is_off_unless_asked_for(monkeypatch, log, switch):
    caller, registry = fake.install(monkeypatch)
    if switch is not None:
        monkeypatch.setenv(plugin.SWITCH, switch)
    plugin.register()
    assert_untouched(caller, registry)
    assert log.messages == []


def test_sglang_off_imports_nothing_of_sglang(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    plugin.register()
    assert not [name for name in sys.modules if name.split(".")[0] == "sglang"]


def test_sglang_rejects_another_switch(monkeypatch, log):
    caller, registry = fake.install(monkeypatch)
    monkeypatch.setenv(plugin.SWITCH, "yes")
    plugin.register()
    assert_untouched(caller, registry)
    assert log.messages == ["register: MLA_FP8_SGLANG must be 0 or 1, got 'yes': SGLang runs its own kernel"]


@pytest.mark.parametrize("module", plugin.MODULES)
def test_sglang_function_is_replaced_where_it_is_called(monkeypatch, switched_on, log, rng, module):
    caller, registry = fake.install(monkeypatch, module=module)
    plugin.register()
    registry.apply_hooks()
    x = randn(rng, 2, 3, 128, dtype=torch.bfloat16)
    got_val, got_scale, *_ = getattr(caller, plugin.FUNCTION)(x)
    want_val, want_scale = reference.quantize_q_nope(x.transpose(0, 1), amax_floor=1e-12)
    assert_same_bits(got_val[:, :3], want_val[:, :3], "x_val")
    assert_same_bits(got_scale[:, :3], want_scale[:, :3], "x_scale")
    assert log.messages == [
        f"register: {module}.{plugin.FUNCTION} runs mla_fp8.quantize_q_nope",
        f"{plugin.FUNCTION}: runs mla_fp8.quantize_q_nope on cpu",
    ]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sglang_contract_shapes_strides_dtypes_values(quantize, rng, device, dtype, shape, view):
    x = VIEWS[view](randn(rng, *shape, dtype=dtype, device=device))
    got, want = quantize(x), fake.masked_quantization(x)
    assert len(got) == 5 and got[3:] == want[3:] and all(type(extent) is int for extent in got[3:])
    for g, w in zip(got[:3], want[:3], strict=True):
        assert (g.shape, g.stride(), g.dtype, g.device) == (w.shape, w.stride(), w.dtype, w.device)
    rows = shape[1]
    assert_same_bits(got[1][:, :rows], want[1][:, :rows], "x_scale")
    assert_same_bits(got[2], want[2], "masked_m")
    got_val, want_val = got[0][:, :rows], want[0][:, :rows]
    fail_at_worst((codes(got_val) - codes(want_val)).abs() > ONE_STEP, got_val, want_val, "x_val")


def test_sglang_no_tokens(quantize):
    x_val, x_scale, masked_m, rows, aligned = quantize(torch.empty(3, 0, 512, dtype=torch.bfloat16))
    assert (x_val.shape, x_scale.shape, masked_m.tolist(), rows, aligned) == ((3, 0, 512), (3, 0, 4), [0, 0, 0], 0, 0)


@pytest.mark.parametrize("eps", [None, 1e-12, 1e-30, 1e-4, 2.0])
def test_sglang_eps_is_the_floor_of_amax(quantize, device, eps):
    x = torch.tensor([0.0, 1e-15, 1e-9, 1e-5, 1.0], device=device).bfloat16()[:, None].repeat(2, 1, 128)
    options = {} if eps is None else {"eps": eps}
    got, want = quantize(x, **options), fake.masked_quantization(x, **options)
    got_val, got_scale, want_val, want_scale = (t[:, :5] for t in (*got[:2], *want[:2]))
    assert_same_bits(got_scale, want_scale, "x_scale")
    fail_at_worst((codes(got_val) - codes(want_val)).abs() > ONE_STEP, got_val, want_val, "x_val")
    zero_row = got_scale[0, 0, 0].item() * 448
    assert zero_row == pytest.approx(1e-12 if eps is None else eps, rel=1e-6)


def test_sglang_padding_is_left_unwritten(quantize, monkeypatch):
    asked = {}
    monkeypatch.setattr(plugin, "quantize_q_nope", lambda q, **o: asked.update(o) or reference.quantize_q_nope(q))
    quantize(torch.ones(1, 1, 128, dtype=torch.bfloat16))
    assert asked == {"m_alignment": 256, "amax_floor": 1e-12, "zero_pad": False}


CHANGED = {
    "(x, group_size=128, eps=1e-10, dtype=torch.float8_e4m3fn)": lambda x, group_size=128, eps=1e-10, dtype=E4M3: 0,
    "(x, group_size=128, eps=1e-12, dtype=torch.float8_e4m3fnuz)": (
        lambda x, group_size=128, eps=1e-12, dtype=torch.float8_e4m3fnuz: 0
    ),
    "(x, group_size=128, eps=1e-12)": lambda x, group_size=128, eps=1e-12: 0,
    "(x, eps=1e-12, group_size=128, dtype=torch.float8_e4m3fn)": lambda x, eps=1e-12, group_size=128, dtype=E4M3: 0,
    "(x, group_size=128, eps=1e-12, dtype=torch.float8_e4m3fn, ue8m0=False)": (
        lambda x, group_size=128, eps=1e-12, dtype=E4M3, ue8m0=False: 0
    ),
    "(x, *, group_size=128, eps=1e-12, dtype=torch.float8_e4m3fn)": (
        lambda x, *, group_size=128, eps=1e-12, dtype=E4M3: 0
    ),
    "()": lambda: 0,
    "None": object(),
}


@pytest.mark.parametrize("signature", CHANGED)
def test_sglang_steps_aside_for_another_signature(monkeypatch, switched_on, log, signature):
    caller, registry = fake.install(monkeypatch, CHANGED[signature])
    plugin.register()
    registry.apply_hooks()
    assert getattr(caller, plugin.FUNCTION) is CHANGED[signature]
    assert log.messages == [
        f"register: {plugin.FUNCTION}'s signature must be (x, group_size=128, eps=1e-12, dtype=torch.float8_e4m3fn), "
        f"got {signature}: SGLang runs its own kernel"
    ]


def test_sglang_steps_aside_without_the_function(monkeypatch, switched_on, log):
    _, registry = fake.install(monkeypatch, None)
    plugin.register()
    assert registry.hooks == []
    (message,) = log.messages
    assert message.startswith(f"register: sglang must have {plugin.FUNCTION} in {plugin.MODULES[0]} or ")
    assert message.endswith(": SGLang runs its own kernel")


def test_sglang_steps_aside_without_a_hook_registry(monkeypatch, switched_on, log):
    caller, registry = fake.install(monkeypatch, registry=False)
    plugin.register()
    assert_untouched(caller, registry)
    (message,) = log.messages
    assert message.startswith(f"register: sglang must have HookRegistry.register in {plugin.HOOKS}, got sglang ")


X = torch.ones(2, 3, 256, dtype=torch.bfloat16)
NOT_TAKEN = {
    "x must be bfloat16 or float16, got torch.float32": (X.float(),),
    "x must have 3 dimensions, got 2": (X[0],),
    "x must be on cuda or cpu, got meta": (X.to("meta"),),
    "x must have a contiguous last dimension, got stride 2": (X[:, :, ::2],),
    "x's last dimension must be a multiple of 128 up to 16384, got 192": (X[:, :, :192],),
    "group_size must be 128, got 64": (X, 64),
    "dtype must be torch.float8_e4m3fn, got torch.float8_e5m2": (X, 128, 1e-12, torch.float8_e5m2),
    "eps must be finite and at least 1e-30, got 0.0": (X, 128, 0.0),
    "eps must be finite and at least 1e-30, got inf": (X, 128, float("inf")),
    "eps must be finite and at least 1e-30, got nan": (X, 128, float("nan")),
    "x must not require grad, got requires_grad=True": (X.clone().requires_grad_(),),
}


@pytest.mark.parametrize("reason", NOT_TAKEN)
def test_sglang_call_that_the_op_does_not_take_runs_sglangs_own(log, reason):
    calls = []
    for _ in range(2):
        assert plugin.around(lambda *arguments: calls.append(arguments) or "theirs", *NOT_TAKEN[reason]) == "theirs"
    given = NOT_TAKEN[reason]
    want = given + (None, 128, 1e-12, E4M3)[len(given) :]
    assert [len(call) for call in calls] == [4, 4]
    assert all(g is w or g == w for call in calls for g, w in zip(call, want, strict=True))
    assert log.messages == [f"{plugin.FUNCTION}: {reason}: this call runs SGLang's own kernel"]


def test_sglang_register_example_runs():
    (test,) = doctest.DocTestFinder().find(plugin.register, "register", globs={"register": plugin.register})
    assert doctest.DocTestRunner().run(test).failed == 0 and len(test.examples) == 1
