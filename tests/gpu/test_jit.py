"""NVRTC needs no GPU: every kernel is compiled here as a machine without an embedded image would."""

import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import processes
import pytest

from mla_fp8 import _native, jit

# From an op's first call in a process to its first result, and with an empty cache where NVRTC must compile.
FIRST_USE_SECONDS = 15
EMBEDDED_SECONDS = 0.5
ONE_LINE = (
    r"mla_fp8: no embedded kernel runs here: NVRTC compiles \w+ for sm_90a, one of 4 kernels, some seconds each; "
    r"kept in \S+"
)
OPS = ("quantize_q_nope", "bmm", "absorb_q", "v_up")
ELF_MAGIC = b"\x7fELF"
FATBIN_MAGIC = bytes.fromhex("50ed55ba")
SMALL = "sm90/quantize_q_nope"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mla_fp8"


def cached_files(cache):
    return sorted(cache.iterdir()) if cache.is_dir() else []


@pytest.mark.parametrize("op", OPS)
def test_jit_compiles_every_kernel(cache, op):
    begin = time.process_time()
    image = jit.load(f"sm90/{op}")
    seconds = time.process_time() - begin  # of this process alone: others may be busy
    assert seconds < FIRST_USE_SECONDS, f"{op}: {seconds:.1f} s to compile"
    assert image.startswith(ELF_MAGIC)
    tiles = (jit.source_directory() / "kernels" / "sm90" / "tiles.h").read_text()
    symbols = {line.split("(")[1].split(",")[0] for line in tiles.splitlines() if line.startswith(f"  X({op}")}
    missing = [symbol for symbol in symbols if b"\0.text." + symbol.encode() + b"\0" not in image]
    assert symbols and not missing, f"{op}: no code for {missing}"


def test_jit_second_load_comes_from_the_cache(cache, caplog):
    with caplog.at_level(logging.INFO, "mla_fp8"):
        first = jit.load(SMALL)
        assert [r for r in caplog.messages if Path(SMALL).name in r], "compiling is announced"
        caplog.clear()
        assert jit.load(SMALL) == first
    assert not caplog.messages, "a cache hit is silent"
    assert len(cached_files(cache)) == 1


def test_jit_key_changes_with_the_sources(cache, tmp_path, monkeypatch):
    jit.load(SMALL)
    copy = tmp_path / "csrc"
    subprocess.run(["cp", "-r", str(jit.source_directory()), str(copy)], check=True, timeout=60)
    monkeypatch.setattr(jit, "source_directory", lambda: copy)
    jit.load(SMALL)
    assert len(cached_files(cache)) == 1, "the same sources elsewhere are the same image"
    for count, name in enumerate(["product.h", "kernels/sm90/tiles.h"], start=2):
        (copy / name).write_text((copy / name).read_text() + "// changed\n")
        jit.load(SMALL)
        assert len(cached_files(cache)) == count, name


def call_loader(name: bytes, error_size=8192):
    data, size = ctypes.c_void_p(), ctypes.c_size_t()
    error = ctypes.create_string_buffer(error_size)
    result = jit._callback(name, 0, ctypes.byref(data), ctypes.byref(size), error, error_size)
    return result, data.value, size.value, error.value.decode()


def test_jit_callback_hands_over_memory_that_stays(cache, monkeypatch):
    monkeypatch.setattr(jit, "_images", {})
    result, data, size, _ = call_loader(SMALL.encode())
    assert result == 0 and ctypes.string_at(data, size) == jit.load(SMALL)
    assert call_loader(SMALL.encode())[1] == data, "one copy a process"


def test_jit_compile_error_reaches_the_caller(cache, tmp_path, monkeypatch):
    copy = tmp_path / "csrc"
    subprocess.run(["cp", "-r", str(jit.source_directory()), str(copy)], check=True, timeout=60)
    (copy / "types.h").write_text("#error planted fault\n")
    monkeypatch.setattr(jit, "source_directory", lambda: copy)
    result, _, _, error = call_loader(SMALL.encode())
    assert result != 0 and "planted fault" in error and "quantize_q_nope.cu" in error
    assert len(call_loader(SMALL.encode(), error_size=16)[3]) == 15, "an error is cut to the caller's buffer"
    assert cached_files(cache) == []


def test_jit_without_cuda_bindings_says_what_to_install(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(RuntimeError, match=r"pip install mla_fp8\[cuda\]"):
        jit.load(SMALL)


def test_jit_import_leaves_cuda_alone(tmp_path):
    code = """if True:
        import sys, torch  # which may import some of it itself
        before = set(sys.modules)
        import mla_fp8
        assert not {name for name in set(sys.modules) - before if name.split(".")[0] == "cuda"}
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=60)


def test_jit_warm_up_without_a_gpu_says_so(tmp_path):
    command = [sys.executable, "-c", "from mla_fp8 import jit; jit.warm_up()"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    assert result.returncode != 0 and result.stderr.splitlines()[-1].startswith("RuntimeError: ")


@pytest.fixture
def without_images(tmp_path):
    """The environment in which `python -S` imports a copy of the package whose embedded kernels no driver takes."""
    package = tmp_path / "site" / "mla_fp8"
    shutil.copytree(Path(jit.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in _native.LIBRARY.parent.glob("*.so"):
        shutil.copy(path, package)
    shutil.copytree(jit.source_directory(), package / "csrc", dirs_exist_ok=True)
    library = package / _native.LIBRARY.name
    library.write_bytes(library.read_bytes().replace(FATBIN_MAGIC, bytes(4)))
    paths = [tmp_path / "site", Path(processes.__file__).parent, *filter(None, sys.path)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def run_in(environment, code, tmp_path, *options):
    """In a fresh process with an empty cache -> what it printed, and to stderr."""
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    environment = environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    ran = processes.run(command, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, ran.stderr


def test_jit_library_without_images_is_what_the_tests_below_load(tmp_path, without_images):
    code = """
        import torch, mla_fp8
        from mla_fp8 import _native
        heads = {_native.embedded_image("sm90/" + op)[:4] for op in ("quantize_q_nope", "bmm", "absorb_q", "v_up")}
        print(_native.LIBRARY, heads <= {b"", bytes(4)})
        print(mla_fp8.quantize_q_nope(torch.ones(1, 1, 128, dtype=torch.bfloat16))[0].shape)
    """
    printed, _ = run_in(without_images, code, tmp_path, "-S")
    library = tmp_path / "site" / "mla_fp8" / _native.LIBRARY.name
    assert printed.splitlines() == [f"{library} True", "torch.Size([1, 256, 128])"]


FIRST_CALL = """
    import time, torch
    from cases import CASE
    from mla_fp8 import jit

    case = CASE[{name!r}]
    arguments = case.arguments(torch.Generator().manual_seed(0), s=65, h=16, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    case.call(arguments)
    torch.cuda.synchronize()
    print(time.perf_counter() - begin, *jit._images)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_jit_first_use_gives_a_result_within_seconds(tmp_path, without_images, op):
    """It compiles this op's kernels and no others, and one line says so, and for how long."""
    printed, said = run_in(without_images, FIRST_CALL.format(name=op), tmp_path, "-S")
    seconds, *compiled = printed.split()
    (line,) = [line for line in said.splitlines() if line.startswith("mla_fp8")]
    assert compiled == [f"sm90/{op}"] and re.fullmatch(ONE_LINE, line), said
    assert float(seconds) < FIRST_USE_SECONDS


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_jit_embedded_kernels_give_a_result_at_once(tmp_path, op):
    if not _native.embedded_image(f"sm90/{op}"):
        pytest.skip("built without nvcc: nothing is embedded")
    tests = {"PYTHONPATH": str(Path(processes.__file__).parent)}
    printed, said = run_in(os.environ | tests, FIRST_CALL.format(name=op), tmp_path)
    seconds, *compiled = printed.split()
    assert compiled == [] and "mla_fp8" not in said
    assert float(seconds) < EMBEDDED_SECONDS
