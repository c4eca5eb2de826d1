"""The build's own facts: where it finds torch, what it asks pip for, and that no source is forgotten."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {".cmake", ".cpp", ".cu", ".cuh", ".h", ".in", ".py", ".pyi"}


def _find_torch(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs find_torch.py with nothing in the environment but what is given."""
    command = [sys.executable, *options, str(ROOT / "build_support" / "find_torch.py")]
    return subprocess.run(command, env={"PATH": "", **environment}, capture_output=True, text=True, timeout=60)


def test_build_finds_the_target_environments_torch() -> None:
    assert Path(_find_torch("-S").stdout.strip()) == Path(torch.__file__).parent


def test_build_takes_a_given_torch_directory_first() -> None:
    directory = str(Path(torch.__file__).parent)
    assert _find_torch(MLA_FP8_TORCH_DIR=directory).stdout.strip() == directory


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0"])
def test_build_passes_over_an_old_torch(tmp_path: Path, version: str) -> None:
    (tmp_path / "include/torch/csrc/stable").mkdir(parents=True)
    (tmp_path / "include/torch/csrc/stable/library.h").touch()
    (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
    found = _find_torch(MLA_FP8_TORCH_DIR=str(tmp_path))
    assert Path(found.stdout.strip()) == Path(torch.__file__).parent


def test_every_source_is_named_in_cmake() -> None:
    named = set(re.findall(r"csrc/[\w/]+\.cpp", (ROOT / "CMakeLists.txt").read_text()))
    assert named == {str(file.relative_to(ROOT)) for file in ROOT.glob("csrc/**/*.cpp")}


def test_every_kernel_is_embedded() -> None:
    (given,) = re.findall(r"mla_fp8_embed_kernels\(mla_fp8\s([^)]+)\)", (ROOT / "CMakeLists.txt").read_text())
    (architectures,) = re.findall(r"set\(MLA_FP8_ARCHITECTURES ([^)]+)\)", (ROOT / "cmake/kernels.cmake").read_text())
    folders = ["sm" + re.sub("[a-z]", "", name) for name in architectures.split()]
    embedded = {f"csrc/kernels/{folder}/{op}.cu" for folder in folders for op in given.split()}
    assert embedded == {str(file.relative_to(ROOT)) for file in ROOT.glob("csrc/kernels/**/*.cu")}


def test_three_files_name_an_architecture_beside_its_folder() -> None:
    """CONTRIBUTING.md lists what another one takes: these files, so no other may name one, in a comment neither."""
    folders = {file.parent for file in ROOT.glob("csrc/kernels/*/tiles.h")}
    files = [file for room in ("cmake", "csrc", "mla_fp8") for file in (ROOT / room).rglob("*.*")]
    sources = [file for file in files if file.suffix in SOURCES and file.parent not in folders]
    naming = {file for file in sources if re.search(r"\b(sm|compute)_?\d\d|\b9, 0\b", file.read_text())}
    assert {str(file.relative_to(ROOT)) for file in naming} == {
        "cmake/kernels.cmake",
        "csrc/config/tile.h",
        "mla_fp8/devices.py",
    }


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs an nvcc on the PATH")
@pytest.mark.parametrize("op", ["absorb_q", "bmm", "v_up"])
def test_the_compiler_keeps_wgmma_asynchronous(tmp_path: Path, op: str) -> None:
    """A wait between wgmma's fence and wgmma makes ptxas run them one by one: right, but slower. It only says so."""
    source, options = ROOT / f"csrc/kernels/sm90/{op}.cu", ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17"]
    command = ["nvcc", "-cubin", *options, f"-I{ROOT / 'csrc'}", "-o", str(tmp_path / "kernels.cubin"), str(source)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=80)
    assert said.returncode == 0, said.stderr
    assert "serialized" not in said.stdout + said.stderr


def test_package_asks_for_torch_without_an_upper_bound() -> None:
    requires = importlib.metadata.requires("mla_fp8") or []
    assert [line for line in requires if line.startswith("torch") and "extra" not in line] == ["torch>=2.10"]
