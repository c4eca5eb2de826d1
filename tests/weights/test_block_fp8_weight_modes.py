"""BlockFp8Weight in compiled code, inference mode, other modes and threads; what is counted and said of its reads."""

import threading

import pytest
import torch
from block_weights import HEADS, exact_result, make, op_result, token_major
from helpers import EXACT_FROBENIUS, ROUNDING_FROBENIUS, assert_frobenius, assert_same_bits, randn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mla_fp8 import BlockFp8Weight
from mla_fp8.weights import uses
from mla_fp8.weights.block_fp8_weight import counts, reset_counts

BF16 = torch.bfloat16
BACKENDS = ["eager", "aot_eager", "inductor"]
# Two products, each exact to a rounding of its result; Inductor may round at other places.
CHAIN_FROBENIUS = 3 * EXACT_FROBENIUS[BF16]


@pytest.fixture(autouse=True)
def from_zero(monkeypatch):
    monkeypatch.setattr(uses, "_said", set())
    torch._dynamo.reset()
    reset_counts()


class Layer(torch.nn.Module):
    """Both products of a layer, with what lies between left out; weights held in each of the three ways."""

    def __init__(self, rng, device="cpu"):
        super().__init__()
        self.w_uk = torch.nn.Parameter(make(rng, "w_uk", device=device), requires_grad=False)
        self.register_buffer("w_uv", make(rng, "w_uv", device=device))
        self.__dict__["again"] = make(rng, "w_uk", device=device)

    def forward(self, x):
        latent = torch.bmm(x.transpose(0, 1) * 2, self.w_uk)
        out = torch.bmm(latent, self.w_uv).transpose(0, 1) + 1
        return torch.bmm(out.transpose(0, 1), self.again).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_layer_runs_products_of_any_s(rng, device, backend, inference):
    layer = Layer(rng, device)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.inference_mode(inference), torch.no_grad():
        for s in (4, 7, 33):
            x = token_major(rng, layer.w_uk.data, s)
            torch._dynamo.mark_dynamic(x, 0)
            want = layer(x)
            assert_frobenius(compiled(x), want.double(), CHAIN_FROBENIUS)
    assert counts().dequantizations == 0
    assert counter.frame_count == 1, "one graph for any S"


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_function_takes_weights_and_their_views(rng, device, backend):
    @torch.compile(fullgraph=True, backend=backend)
    def run(x, weight):
        out = torch.empty(HEADS, x.shape[0], 512, dtype=x.dtype, device=x.device)
        torch.bmm(x.transpose(0, 1), weight.transpose(1, 2).mT, out=out)
        return out, x[:, 1:].transpose(0, 1) @ weight[1:]

    weight = make(rng, device=device)
    x = token_major(rng, weight)
    with torch.no_grad():
        out, part = run(x, weight)
    assert_same_bits(out.transpose(0, 1), op_result(x, weight))
    assert_same_bits(part, out[1:])
    assert counts().dequantizations == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_reader_gets_the_numbers(rng, backend):
    @torch.compile(fullgraph=True, backend=backend)
    def read(weight):
        return weight.float() + 1, weight.dequantize() * 2, weight.mT[1]

    weight = make(rng)
    numbers = weight.dequantize()
    for got, want in zip(read(weight), (numbers.float() + 1, numbers * 2, numbers.mT[1]), strict=True):
        assert got.dtype == want.dtype
        assert_frobenius(got, want.double(), ROUNDING_FROBENIUS)  # Inductor leaves roundings between out


def test_compiled_code_sees_an_update(rng):
    weight, other = make(rng), make(rng)
    run = torch.compile(lambda x: torch.bmm(x, weight), fullgraph=True)
    x = token_major(rng, weight).transpose(0, 1)
    with torch.no_grad():
        assert_same_bits(run(x), torch.bmm(x, weight))
        weight.update_(other.weight, other.scale)
        assert_same_bits(run(x), torch.bmm(x, other))


@pytest.mark.parametrize("used_inside", [False, True])
@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_made_and_used_in_or_out(rng, device, made_inside, used_inside):
    with torch.inference_mode(made_inside):
        weight, other = make(rng, device=device), make(rng, device=device)
    with torch.inference_mode(used_inside):
        x = token_major(rng, weight)
        for one in (weight, weight.mT.mT, weight[:], weight.clone(), weight.detach()):
            got = torch.bmm(x.transpose(0, 1), one)
            assert_same_bits(got.transpose(0, 1), op_result(x, weight))
        out = torch.empty_like(got)
        torch.bmm(x.transpose(0, 1), weight.update_(other.weight, other.scale), out=out)
        assert_same_bits(out.transpose(0, 1), op_result(x, other))
    assert counts() == (6, 0)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunction(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


MODES = {
    "dispatch_mode": Seen,
    "function_mode": SeenFunction,
    "default_device": lambda: torch.device("cpu"),
    "no_subclass_functions": torch._C.DisableTorchFunctionSubclass,
    "autocast": lambda: torch.autocast("cpu", BF16),
}


@pytest.mark.parametrize("mode", MODES)
def test_product_runs_under_a_mode(rng, mode):
    weight = make(rng)
    x = token_major(rng, weight)
    with MODES[mode]():
        got = torch.bmm(x.transpose(0, 1), weight)
    assert_same_bits(got.transpose(0, 1), op_result(x, weight))
    assert counts() == (1, 0)


def test_autocast_casts_the_other_factor(rng):
    weight = make(rng)
    x = token_major(rng, weight)
    with torch.autocast("cpu", BF16):
        got = torch.bmm(x.float().transpose(0, 1), weight)
    assert_same_bits(got.transpose(0, 1), op_result(x, weight))
    assert counts() == (1, 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_have_the_shape_of_the_product(rng, device):
    with FakeTensorMode() as mode:
        weight = BlockFp8Weight(torch.empty(HEADS, 512, 128, dtype=torch.float8_e4m3fn, device=device),
                                torch.empty(HEADS, 4, 1, device=device))  # fmt: skip
        got = torch.bmm(torch.empty(HEADS, 7, 128, dtype=BF16, device=device), weight)
        assert (got.shape, got.stride(), got.dtype) == ((HEADS, 7, 512), (512, HEADS * 512, 1), BF16)
        assert type(mode.from_tensor(make(rng))) is BlockFp8Weight
    assert counts().dequantizations == 0


def test_threads_get_their_own_results_and_all_are_counted(rng):
    """Each thread writes its own slice; a counter that loses steps would miss some."""
    weight, threads, calls = make(rng, heads=1), 4, 300
    xs = [token_major(rng, weight, 1).transpose(0, 1) for _ in range(threads)]
    wants = [torch.bmm(x, weight) for x in xs]
    reset_counts()
    wrong = []

    def run(x, want):
        out = torch.empty_like(want)
        for _ in range(calls):
            if not torch.equal(torch.bmm(x, weight, out=out), want):
                wrong.append(x)
            weight.dequantize()

    running = [threading.Thread(target=run, args=pair) for pair in zip(xs, wants, strict=True)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong
    assert counts() == (threads * calls, threads * calls)


def test_counts_tell_products_from_dequantizations(rng):
    weight = make(rng)
    x = token_major(rng, weight).transpose(0, 1)
    torch.bmm(x, weight)
    weight.dequantize()
    weight.float()
    assert counts() == counts() == (1, 2)
    assert counts().products == 1 and counts().dequantizations == 2
    reset_counts()
    assert counts() == (0, 0)


@pytest.fixture
def said(monkeypatch):
    """What is logged, whatever others did to the logger."""
    texts = []
    monkeypatch.setattr(uses._log, "warning", lambda text, *args: texts.append(text % args))
    return texts


def test_read_is_said_once_a_function_by_its_name(rng, said):
    weight = make(rng)
    for _ in range(2):
        weight.float()
        torch.cat((weight, weight))
    assert [text.split(" dequantizes ")[0] for text in said] == [
        "BlockFp8Weight: aten._to_copy.default", "BlockFp8Weight: aten.cat.default"]  # fmt: skip
    assert counts().dequantizations == 6


def test_product_that_dequantizes_says_why(rng, said):
    weight = make(rng)
    x = randn(rng, HEADS, 128, 5, dtype=BF16).mT
    torch.bmm(x, weight)
    assert said == [
        "BlockFp8Weight: aten.bmm.default dequantizes the whole weight [3, 128, 512], for the other factor must have a "
        "contiguous last dim, got strides [640, 1, 5]: said once a function, counted by counts()"
    ]


def test_products_and_explicit_dequantize_say_nothing(rng, said):
    weight = make(rng)
    torch.bmm(token_major(rng, weight).transpose(0, 1), weight)
    weight.dequantize(torch.float32)
    assert not said


@torch.library.custom_op("test_block_fp8_weight::attention", mutates_args=("out",))
def attention(x: torch.Tensor, out: torch.Tensor) -> None:
    """As engines do it: an op that compiled code does not look into finds its layer by itself."""
    torch.bmm(x.transpose(0, 1), LAYER["weight"], out=out[..., :512].transpose(0, 1))


@attention.register_fake
def _(x, out):
    pass


LAYER: dict[str, BlockFp8Weight] = {}


def test_product_inside_an_opaque_op_of_compiled_code(rng, monkeypatch):
    weight = make(rng)
    monkeypatch.setitem(LAYER, "weight", weight)

    @torch.compile(fullgraph=True)
    def run(x):
        out = torch.zeros(x.shape[0], HEADS, 576, dtype=x.dtype)
        attention(x * 1, out)
        return out * 2

    x = token_major(rng, weight)
    with torch.inference_mode():
        got = run(x)
    assert_frobenius(got[..., :512] / 2, exact_result(x, weight), EXACT_FROBENIUS[BF16])
    assert not got[..., 512:].any() and counts() == (1, 0)
