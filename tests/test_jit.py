"""NVRTC needs no GPU: every kernel is compiled here as a machine without an embedded image would."""

import ctypes
import logging
import os
import subprocess
import sys

import pytest

from mla_fp8 import jit

OPS = ("quantize_q_nope", "bmm", "absorb_q", "v_up")
ELF_MAGIC = b"\x7fELF"
SMALL = "quantize_q_nope"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mla_fp8"


def cached_files(cache):
    return sorted(cache.iterdir()) if cache.is_dir() else []


@pytest.mark.parametrize("op", OPS)
def test_jit_compiles_every_kernel(cache, op):
    image = jit.load(op)
    assert image.startswith(ELF_MAGIC)
    tiles = (jit.source_directory() / "config" / "tiles.h").read_text()
    symbols = {line.split("(")[1].split(",")[0] for line in tiles.splitlines() if line.startswith(f"  X({op}")}
    missing = [symbol for symbol in symbols if b"\0.text." + symbol.encode() + b"\0" not in image]
    assert symbols and not missing, f"{op}: no code for {missing}"


def test_jit_second_load_comes_from_the_cache(cache, caplog):
    with caplog.at_level(logging.INFO, "mla_fp8"):
        first = jit.load(SMALL)
        assert [r for r in caplog.messages if SMALL in r], "compiling is announced"
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
    header = copy / "kernels" / "types.h"
    header.write_text(header.read_text() + "// changed\n")
    jit.load(SMALL)
    assert len(cached_files(cache)) == 2


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
    (copy / "kernels" / "types.h").write_text("#error planted fault\n")
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
