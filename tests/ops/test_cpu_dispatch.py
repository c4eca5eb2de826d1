"""Which instruction set the CPU kernels run on: the best that build and machine have; `info` names it."""

import os
import subprocess
from pathlib import Path

import pytest

from mla_fp8 import _native
from mla_fp8.cli import facts

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# The build's MLA_FP8_CPU -> what it lets csrc/cpu/dispatch.cpp use, as CMakeLists.txt says it.
BUILDS = {"AUTO": (1, 1, 1), "avx512": (0, 1, 1), "avx2": (0, 0, 1), "portable": (0, 0, 0)}
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
AMX = {*AVX512, "avx512vbmi", "amx_tile", "amx_bf16"}  # Linux shows the last two only if it lets a process have them
NEEDS = {"amx": AMX, "avx512": AVX512, "avx2": {"avx2", "fma", "f16c"}, "portable": set()}
# The kernels themselves take a minute to compile; their names are all that is asked for.
PROGRAM = """
#include <cstdio>
#include "cpu/gemm.h"
#include "cpu/kernels.h"
namespace mla_fp8::cpu {
static const Kernels kAmx = {"amx", nullptr, nullptr}, kAvx512 = {"avx512", nullptr, nullptr};
static const Kernels kAvx2 = {"avx2", nullptr, nullptr}, kPortable = {"portable", nullptr, nullptr};
const Kernels* amx_kernels() { return &kAmx; }
const Kernels* avx512_kernels() { return &kAvx512; }
const Kernels* avx2_kernels() { return &kAvx2; }
const Kernels& portable_kernels() { return kPortable; }
}  // namespace mla_fp8::cpu
int main() { std::puts(mla_fp8_cpu_instruction_set()); }
"""


def best_of(allowed):
    """The first of `allowed`, best first, for which this machine has everything."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return next((name for name in allowed if NEEDS[name] <= flags), None)


@pytest.mark.parametrize("build", BUILDS)
def test_cpu_dispatch_takes_the_best_that_the_build_allows(tmp_path, build):
    use_amx, use_avx512, use_avx2 = BUILDS[build]
    (tmp_path / "main.cpp").write_text(PROGRAM)
    defines = [f"-DMLA_FP8_USE_{name}={BUILDS[build][i]}" for i, name in enumerate(("AMX", "AVX512", "AVX2"))]
    sources = [tmp_path / "main.cpp", CSRC / "cpu" / "dispatch.cpp"]
    command = [os.environ.get("CXX", "g++"), "-std=c++17", f"-I{CSRC}", *defines, *sources, "-o", tmp_path / "main"]
    subprocess.run(command, check=True, timeout=60)
    printed = subprocess.run([tmp_path / "main"], check=True, capture_output=True, text=True, timeout=60).stdout
    allowed = ["amx"] * use_amx + ["avx512"] * use_avx512 + ["avx2"] * use_avx2 + ["portable"]
    assert printed.strip() == best_of(allowed)


def test_info_names_the_instruction_set_of_the_library():
    chosen = _native.cpu_instruction_set()
    assert chosen in NEEDS and best_of([chosen]) == chosen
    cpu = facts.cpu_facts()
    assert cpu["instruction_set"] == chosen
    assert {row["why"] for row in facts.paths(cpu, [])} == {f"{chosen} kernels, the best of this CPU and build"}
