"""Fixtures that every test shares: the device, the two activation dtypes, and a fresh random generator."""

import secrets
import zlib

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("mla_fp8", deadline=None, print_blob=True)
hypothesis.settings.load_profile("mla_fp8")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="repeat a run whose header showed this seed")
    parser.addoption("--fuzz-cases", type=int, default=1000, help="calls that test_ops_fuzz.py draws")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device of compute capability 9.0")
    if config.option.seed is None:
        config.option.seed = secrets.randbelow(2**31)
    hypothesis.settings.register_profile(
        "fuzz", hypothesis.settings.get_profile("mla_fp8"), max_examples=config.option.fuzz_cases
    )
    # Without -m, a machine without a GPU leaves the gpu tests out; `-m gpu` there fails instead of passing silently.
    if not config.option.markexpr and not torch.cuda.is_available():
        config.option.markexpr = "not gpu"


def pytest_report_header(config):
    return f"inputs: --seed={config.option.seed}"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request):
    return request.param


@pytest.fixture
def rng(request):
    """A generator that differs from run to run and from test to test; --seed repeats it."""
    seed = request.config.option.seed ^ zlib.crc32(request.node.nodeid.encode())
    print(f"generator seed {seed}, from --seed={request.config.option.seed}")
    return torch.Generator().manual_seed(seed)
