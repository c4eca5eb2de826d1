"""The built library loads everywhere: the stable ABI of the oldest torch, no CUDA, no Python, no RPATH."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mla_fp8  # noqa: F401

# What an import may add to torch's own, which it shares; the best of a few, since a first one reads from a cold disk.
IMPORT_SECONDS = 0.3
IMPORT_ATTEMPTS = 3
NEEDED = {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libdl.so.2"}


@pytest.fixture(scope="module")
def config_module() -> Path:
    spec = importlib.util.find_spec("mla_fp8._config")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


@pytest.fixture(scope="module")
def library(config_module: Path) -> Path:
    return config_module.with_name("libmla_fp8.so")


def _output(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True, timeout=60).stdout


def _dynamic(file: Path, tag: str) -> set[str]:
    return set(re.findall(rf"\({tag}\).*\[(.*)\]", _output("readelf", "-dW", file)))


def test_library_links_only_libtorch_cpu(library: Path) -> None:
    needed = {name for name in _dynamic(library, "NEEDED") if not name.startswith("ld-linux")}
    assert "libtorch_cpu.so" in needed
    assert needed <= NEEDED


def test_library_has_no_rpath(library: Path) -> None:
    assert not _dynamic(library, "RPATH") | _dynamic(library, "RUNPATH")


def test_library_binds_at_load(library: Path) -> None:
    assert "BIND_NOW" in _output("readelf", "-dW", library)


def test_library_exports_only_its_c_functions(library: Path) -> None:
    symbols = _output("nm", "-D", "--defined-only", "--format=just-symbols", library).split()
    assert symbols
    assert [symbol for symbol in symbols if not symbol.startswith("mla_fp8_")] == []


def test_library_uses_no_python(library: Path) -> None:
    undefined = _output("nm", "-D", "--undefined-only", "--format=just-symbols", library).split()
    assert [symbol for symbol in undefined if symbol.startswith(("Py", "_Py"))] == []


def test_library_targets_torch_2_10(library: Path) -> None:
    from torch_abi_audit import inspect_extension

    verdict = inspect_extension(library).torch
    assert verdict.stable, verdict.unstable_symbols
    assert verdict.unknown_shim_symbols == ()
    assert verdict.min_torch_version == "2.10.0", verdict.version_defining_symbols


def test_config_links_no_torch_and_no_cuda(config_module: Path) -> None:
    assert [name for name in _dynamic(config_module, "NEEDED") if re.search("torch|c10|cuda", name)] == []
    assert not _dynamic(config_module, "RPATH") | _dynamic(config_module, "RUNPATH")


def test_config_imports_without_torch(config_module: Path) -> None:
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("mla_fp8._config", {str(config_module)!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
print("torch" in sys.modules)
"""
    assert _output(sys.executable, "-c", code).strip() == "False"


def test_import_is_quick() -> None:
    code = "import time, torch; start = time.perf_counter(); import mla_fp8; print(time.perf_counter() - start)"
    seconds = [float(_output(sys.executable, "-c", code)) for _ in range(IMPORT_ATTEMPTS)]
    assert min(seconds) < IMPORT_SECONDS, f"seconds of each attempt: {seconds}"


def test_kernel_sources_are_installed_for_nvrtc(library: Path) -> None:
    installed = library.parent / "csrc"
    assert (installed / "types.h").is_file()
    assert (installed / "constants.h").is_file()
    assert (installed / "product.h").is_file()
    assert (installed / "kernels" / "sm90" / "tiles.h").is_file()
    assert sorted(installed.glob("kernels/sm90/*.cu"))
