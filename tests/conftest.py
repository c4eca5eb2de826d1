"""Fixtures that every test shares: the device, the two activation dtypes, and a fresh random generator."""

import os
import secrets
import sys
import textwrap
import zlib

import hypothesis
import processes
import pytest
import torch

from mla_fp8 import devices


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="repeat a run whose header showed this seed")
    parser.addoption("--fuzz-cases", type=int, help="fresh cases of each fuzz test; else 1,000 that never change")


def pytest_configure(config):
    config.addinivalue_line("markers", f"gpu: needs a CUDA device of compute capability {devices.SUPPORTED}")
    config.addinivalue_line("markers", "slow: takes minutes; `make test-slow`")
    if config.option.seed is None:
        config.option.seed = secrets.randbelow(2**31)
    config.addinivalue_line("markers", "xdist_group(name): what pytest-xdist runs in one worker with --dist loadgroup")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # threads and compilers of all workers together are as many as the cores
        share = max(1, len(os.sched_getaffinity(0)) // workers)
        torch.set_num_threads(share)
        for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
            os.environ.setdefault(name, str(share))  # of child processes, and of torch.compile, which reads it later
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here asks a network, and a look-up may take minutes to fail
    # A change is judged by the cases that the change before it passed; who looks for new ones asks for --fuzz-cases.
    fresh = config.option.fuzz_cases is not None
    hypothesis.settings.register_profile("mla_fp8", deadline=None, print_blob=True, derandomize=not fresh)
    hypothesis.settings.load_profile("mla_fp8")
    hypothesis.settings.register_profile("fuzz", max_examples=config.option.fuzz_cases or 1000)
    # Without -m, the slow tests are left out, and on a machine without a GPU those that need one; `-m gpu` there fails
    # instead of passing silently.
    if not config.option.markexpr:
        config.option.markexpr = "not slow" if torch.cuda.is_available() else "not slow and not gpu"


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


@pytest.fixture
def run_python(tmp_path):
    """Runs code in a process of its own, away from the checkout, where `import mla_fp8` finds the installed package."""

    def run(code: str) -> None:
        paths = [os.path.dirname(processes.__file__), os.environ.get("PYTHONPATH")]  # what tests share is there
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        result = processes.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr

    return run
