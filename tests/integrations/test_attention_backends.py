"""attend_latents through FlashMLA and FlashInfer: on a CPU their contracts (fake_attention.py), on a GPU themselves."""

import warnings

import pytest
import torch
from fake_attention import FakeFlashInfer, FakeFlashMLA
from helpers import ROUNDING_FROBENIUS, assert_frobenius, randn
from test_attention import SCALE, exact, inputs

from mla_fp8.attention import attend, attend_latents, backends

FAKES = {"flash_mla": FakeFlashMLA, "flashinfer": FakeFlashInfer}
# The libraries round softmax weights, the results of parts of a context, and the result, to bf16.
BOUND = 3 * ROUNDING_FROBENIUS


@pytest.fixture
def installed(monkeypatch):
    """installed(names) -> their fakes by name; others are not installed, and a CPU counts as a GPU."""

    def install(*names):
        fakes = {name: FAKES[name](name) for name in names}

        def load(name):
            if name not in fakes:
                raise backends.NotInstalled(f"no {name}; it comes with {backends.PACKAGES[name]}")
            return fakes[name]

        monkeypatch.setattr(backends, "load", load)
        return fakes

    monkeypatch.setattr(backends, "on_hopper", lambda tensor: True)
    monkeypatch.setattr(attend, "_failed", set())
    caches = backends.planned, backends.problem
    for cache in caches:
        cache.cache_clear()
    yield install
    for cache in caches:
        cache.cache_clear()


def cache_views(rng, layout, batch, tokens, device="cpu"):
    """kv_latent and k_pe: of one cache with room for 128 tokens, or each its own, as transformers has them."""
    if layout == "one":
        room = randn(rng, batch, 128, 576, dtype=torch.bfloat16, device=device)
        return room[:, :tokens].split([512, 64], dim=-1)
    room = 128 if layout == "static" else tokens
    return tuple(
        randn(rng, batch, 1, room, width, dtype=torch.bfloat16, device=device)[:, 0, :tokens] for width in (512, 64)
    )


@pytest.mark.parametrize("layout", ["one", "two", "static"])
@pytest.mark.parametrize("batch, queries, tokens", [(1, 1, 1), (3, 1, 64), (2, 3, 70), (1, 2, 128)])
def test_attend_latents_by_a_library_matches_reference(rng, installed, layout, batch, queries, tokens):
    fakes = installed(*FAKES)
    q = randn(rng, batch, queries, 4, 576, dtype=torch.bfloat16)
    kv_latent, k_pe = cache_views(rng, layout, batch, tokens)
    want, name = exact(q, kv_latent, k_pe), "flash_mla" if layout == "one" else "flashinfer"
    for backend in (None, name, "flashinfer"):
        got = attend_latents(q, kv_latent, k_pe, scale=SCALE, backend=backend)
        assert got.shape == (batch, queries, 4, 512) and got.is_contiguous()
        assert_frobenius(got, want, BOUND)
    assert {library: fake.plans for library, fake in fakes.items()} == {"flashinfer": 1, "flash_mla": layout == "one"}


def test_attend_latents_plans_once_for_the_layers_of_a_step(rng, installed):
    fake = installed("flashinfer")["flashinfer"]
    for tokens in (9, 10, 9):
        for _layer in range(3):
            q = randn(rng, 2, 1, 4, 576, dtype=torch.bfloat16)
            kv_latent, k_pe = cache_views(rng, "two", 2, tokens)
            assert_frobenius(attend_latents(q, kv_latent, k_pe, scale=SCALE), exact(q, kv_latent, k_pe), BOUND)
    assert fake.plans == 3


def refused(rng):
    """what -> arguments that no library runs, and the reason."""
    q, kv_latent, k_pe = inputs(rng, torch.bfloat16)
    plain = {"q": q, "kv_latent": kv_latent, "k_pe": k_pe}
    unaligned = torch.zeros(2 * 3 * 4 * 576 + 1, dtype=torch.bfloat16)[1:].view(2, 3, 4, 576)
    return {
        "fp16": ({name: x.half() for name, x in plain.items()}, "q must be torch.bfloat16"),
        "dims": (
            {**plain, "kv_latent": kv_latent[..., :448], "q": q[..., 64:]},
            "R and P must be 512 and 64",
        ),
        "mask": ({**plain, "mask": torch.ones(1, 1, 3, 70, dtype=torch.bool)}, "mask must be None"),
        "no queries": ({**plain, "q": q[:, :0]}, "there must be queries and tokens"),
        "gradient": ({**plain, "q": q.clone().requires_grad_()}, "no input may need a gradient"),
        "last stride": ({**plain, "q": q.mT.contiguous().mT}, "the last strides must be 1"),
        "address": ({**plain, "q": unaligned}, "addresses and strides must be multiples of 16 bytes"),
        "parameter": ({**plain, "q": torch.nn.Parameter(q, requires_grad=False)}, "the inputs must be plain tensors"),
        "order": (
            {**plain, "kv_latent": kv_latent.transpose(0, 1).contiguous().transpose(0, 1)},
            "must begin a whole number of rows after the one before",
        ),
    }


@pytest.mark.parametrize("what", list(refused(torch.Generator())))
def test_attend_latents_leaves_what_a_library_cannot_run_to_torch(rng, installed, what):
    fakes = installed(*FAKES)
    arguments, reason = refused(rng)[what]
    got = attend_latents(**arguments, scale=SCALE)
    torch.testing.assert_close(got, attend_latents(**arguments, scale=SCALE, backend="torch"), rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"backend must be one that can run the call .*{reason}.*, got 'flashinfer'"):
        attend_latents(**arguments, scale=SCALE, backend="flashinfer")
    assert not any(fake.plans for fake in fakes.values())


@pytest.mark.parametrize(
    "tokens, make, reason",
    [
        (70, lambda cache: cache.split([512, 64], dim=-1), "must have room for a multiple of 64 tokens, got 70"),
        (64, lambda cache: (cache[..., :512].clone(), cache[..., 512:]), "must be views of one cache"),
        (64, lambda cache: (cache[..., 64:], cache[..., :64]), "must be views of one cache"),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_attend_latents_takes_flash_mla_only_for_its_pages(rng, installed, tokens, make, reason, batch):
    installed("flash_mla")
    q = randn(rng, batch, 1, 4, 576, dtype=torch.bfloat16)
    kv_latent, k_pe = make(randn(rng, batch, tokens, 576, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=reason):
        attend_latents(q, kv_latent, k_pe, scale=SCALE, backend="flash_mla")
    assert_frobenius(attend_latents(q, kv_latent, k_pe, scale=SCALE), exact(q, kv_latent, k_pe), BOUND)


def test_attend_latents_says_what_is_not_installed(rng, installed):
    installed()
    q, kv_latent, k_pe = inputs(rng, torch.bfloat16)
    with pytest.raises(ValueError, match="no flashinfer; it comes with flashinfer-python.*got 'flashinfer'"):
        attend_latents(q, kv_latent, k_pe, scale=SCALE, backend="flashinfer")
    with pytest.raises(ValueError, match="backend must be one of torch, flash_mla, flashinfer, got 'cudnn'"):
        attend_latents(q, kv_latent, k_pe, scale=SCALE, backend="cudnn")
    assert_frobenius(attend_latents(q, kv_latent, k_pe, scale=SCALE), exact(q, kv_latent, k_pe), BOUND)


def test_attend_latents_goes_on_without_a_library_that_fails(rng, installed, monkeypatch):
    installed("flashinfer")

    def broken(device):
        raise RuntimeError("no compiler here")

    monkeypatch.setitem(backends.PLANNERS, "flashinfer", broken)
    q, kv_latent, k_pe = inputs(rng, torch.bfloat16)
    want = attend_latents(q, kv_latent, k_pe, scale=SCALE, backend="torch")
    with pytest.warns(UserWarning, match="flashinfer failed and is not asked again: no compiler here"):
        torch.testing.assert_close(attend_latents(q, kv_latent, k_pe, scale=SCALE), want, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend_latents(q, kv_latent, k_pe, scale=SCALE)
    with pytest.raises(RuntimeError, match="no compiler here"):
        attend_latents(q, kv_latent, k_pe, scale=SCALE, backend="flashinfer")


def test_attend_latents_compiled_stays_in_one_graph_beside_a_library(rng, installed):
    fakes = installed(*FAKES)
    compiled = torch.compile(attend_latents, backend="aot_eager", fullgraph=True, dynamic=True)
    q, kv_latent, k_pe = inputs(rng, torch.bfloat16)
    want = attend_latents(q, kv_latent, k_pe, scale=SCALE, backend="torch")
    torch.testing.assert_close(compiled(q, kv_latent, k_pe, scale=SCALE), want, rtol=0, atol=0)
    assert not any(fake.plans for fake in fakes.values())
    with pytest.raises(Exception, match="backend must be None or torch under torch.compile"):
        compiled(q, kv_latent, k_pe, scale=SCALE, backend="flashinfer")


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(FAKES))
@pytest.mark.parametrize("batch, queries, heads, tokens", [(1, 1, 16, 1), (3, 1, 128, 100), (2, 2, 16, 128)])
def test_attend_latents_by_an_installed_library(rng, name, batch, queries, heads, tokens):
    try:
        backends.load(name)
    except backends.NotInstalled as missing:
        pytest.skip(str(missing))
    q = randn(rng, batch, queries, heads, 576, dtype=torch.bfloat16, device="cuda")
    for layout in ("one", "two", "static") if name == "flashinfer" else ("one",):
        kv_latent, k_pe = cache_views(rng, layout, batch, tokens, "cuda")
        got = attend_latents(q, kv_latent, k_pe, scale=SCALE, backend=name)
        assert_frobenius(got, exact(q, kv_latent, k_pe), BOUND)


@pytest.mark.gpu
def test_attend_latents_captured_runs_in_torch(rng):
    q, kv_latent, k_pe = inputs(rng, torch.bfloat16, device="cuda")
    want = attend_latents(q, kv_latent, k_pe, scale=SCALE, backend="torch")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend_latents(q, kv_latent, k_pe, scale=SCALE)
    graph.replay()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
