"""What the library asks of the CUDA driver and what it says when refused, with a driver that only keeps a record.

The fake refuses embedded images, as a driver older than the toolkit does: whether this build has some does not matter.
"""

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import processes
import pytest
import torch

from mla_fp8 import _native, jit
from mla_fp8._config import Device

TORCH_CPU = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
IMAGES = ["sm90/absorb_q", "sm90/bmm", "sm90/quantize_q_nope", "sm90/v_up"]
CUBIN = b"\x7fELF, said the fake driver"


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory):
    """A shared library that answers to the driver's name."""
    path = tmp_path_factory.mktemp("fake") / "libcuda.so.1"
    compiler = os.environ.get("CXX", "g++")
    source = Path(processes.__file__).with_name("fake_cuda.cpp")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", path, source]
    subprocess.run(command, check=True, timeout=60)
    return path


@pytest.fixture
def warm_up(fake_driver, tmp_path):
    """Calls a C function of the library in `threads` threads of a fresh process -> calls of the driver, and errors."""

    def run(threads=1, loader=True, function="warm_up", **settings) -> tuple[list[str], set[str]]:
        code = textwrap.dedent(f"""
            import ctypes, importlib.util, os, threading
            ctypes.CDLL({str(fake_driver)!r}, mode=ctypes.RTLD_GLOBAL)  # found before the real one
            ctypes.CDLL({str(TORCH_CPU)!r}, mode=ctypes.RTLD_GLOBAL)  # what the library needs of torch
            library = ctypes.CDLL({str(_native.LIBRARY)!r})
            spec = importlib.util.spec_from_file_location("jit", {jit.__file__!r})
            jit = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(jit)
            def record(line):  # in one piece, among the fake driver's lines
                os.write(1, line.encode() + b"\\n")
            jit.load = lambda name: record("load " + name) or {CUBIN!r}
            library.mla_fp8_set_image_loader(jit._callback if {loader} else None)
            start = threading.Barrier({threads})
            def call():
                error = ctypes.create_string_buffer(8192)
                start.wait()
                if library.mla_fp8_{function}(0, error, len(error)):
                    record("error " + error.value.decode())
                elif error.value:
                    record("text " + error.value.decode())
            threads = [threading.Thread(target=call) for _ in range({threads})]
            [thread.start() for thread in threads], [thread.join() for thread in threads]
        """)
        environment = os.environ | {"FAKE_CAPABILITY": "90"} | {f"FAKE_{k.upper()}": v for k, v in settings.items()}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
        )
        assert result.returncode == 0, result.stderr
        lines = [line.strip() for line in result.stdout.splitlines()]
        return lines, {line.removeprefix("error ") for line in lines if line.startswith("error ")}

    return run


def arguments_of(calls: list[str], name: str) -> list[str]:
    return [call.removeprefix(name).strip() for call in calls if call.split(" ")[0] == name]


def symbols_of_tiles() -> set[str]:
    lines = (jit.source_directory() / "kernels" / "sm90" / "tiles.h").read_text().splitlines()
    return {line.split("(")[1].split(",")[0] for line in lines if line.startswith("  X(")}


def test_driver_loads_every_kernel_once(warm_up):
    calls, errors = warm_up()
    assert not errors
    symbols = arguments_of(calls, "cuLibraryGetKernel")
    assert len(symbols) == len(set(symbols)) and set(symbols) == symbols_of_tiles()
    assert len(arguments_of(calls, "cuKernelGetFunction")) == len(symbols), "loaded into the context before a launch"
    assert arguments_of(calls, "cuLibraryLoadData").count("cubin") == 4
    assert sorted(arguments_of(calls, "load")) == IMAGES
    assert len(arguments_of(calls, "cuCtxSetCurrent")) == 1, "the thread had no context"


def test_driver_relaxes_capture_mode_only_while_loading(warm_up):
    calls, _ = warm_up()
    modes = arguments_of(calls, "cuThreadExchangeStreamCaptureMode")
    assert modes[::2] == ["2"] * (len(modes) // 2) and modes[1::2] == ["0"] * (len(modes) // 2)
    loading = [i for i, call in enumerate(calls) if call.startswith(("cuLibrary", "cuKernel"))]
    for i in loading:
        before = arguments_of(calls[:i], "cuThreadExchangeStreamCaptureMode")
        assert before[-1] == "2", calls[i]


def test_driver_sets_shared_memory_of_large_kernels(warm_up):
    calls, _ = warm_up()
    sizes = [call.split() for call in arguments_of(calls, "cuKernelSetAttribute")]
    assert sizes and all(which == "8" and int(size) > 0 for which, size in sizes)


def test_driver_threads_load_each_kernel_once(warm_up):
    calls, errors = warm_up(threads=16)
    assert not errors
    assert sorted(arguments_of(calls, "cuLibraryGetKernel")) == sorted(symbols_of_tiles())
    assert arguments_of(calls, "cuLibraryLoadData").count("cubin") == 4
    assert sorted(arguments_of(calls, "load")) == IMAGES


@pytest.mark.parametrize("capability", ["80", "89", "100", "120"])
def test_driver_rejects_other_capabilities(warm_up, capability):
    calls, (error,) = warm_up(capability=capability)
    op, got = error.split(": ", 1)
    assert op in ("quantize_q_nope", "bmm", "absorb_q", "v_up")
    assert got == (
        f"device must have compute capability 9.0 (H100, H200), got {capability[:-1]}.{capability[-1]} (Fake GPU)"
    )
    assert not arguments_of(calls, "cuDevicePrimaryCtxRetain"), "nothing is made on such a device"


def test_driver_never_compiles_in_a_capture(warm_up):
    calls, (error,) = warm_up(capturing="1")
    assert "must be compiled before a stream capture" in error and "mla_fp8.jit.warm_up()" in error
    assert not arguments_of(calls, "load")


def test_driver_without_a_loader_says_how_to_build(warm_up):
    _, (error,) = warm_up(loader=False)
    assert "nvcc" in error and "pip install mla_fp8[cuda]" in error


@pytest.mark.parametrize("call", ["cuInit", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"])
def test_driver_errors_name_the_call(warm_up, call):
    _, (error,) = warm_up(fail=call)
    assert error.split(": ", 1)[1] == f"{call} failed: CUDA_ERROR_FAKE (fake text)"


@pytest.mark.parametrize("call", ["cuLibraryGetKernel", "cuKernelSetAttribute", "cuKernelGetFunction"])
def test_driver_errors_in_loading_name_the_kernel(warm_up, call):
    _, (error,) = warm_up(fail=call)
    kernel = error.split(": loading ", 1)[1].removesuffix(" failed: CUDA_ERROR_FAKE (fake text)")
    assert kernel in symbols_of_tiles()


def test_driver_too_old_is_named(warm_up):
    _, (error,) = warm_up(missing="cuLibraryLoadData")
    assert error.endswith("the CUDA driver must support CUDA 12.0 or later, got one without cuLibraryLoadData")


def test_driver_tells_what_select_config_asks_of_a_device(warm_up):
    calls, errors = warm_up(function="device")
    assert not errors
    (text,) = arguments_of(calls, "text")
    told = dict(field.split("=") for field in text.split())
    device = Device(**{name: type(getattr(Device(), name))(value) for name, value in told.items()})
    assert device.capability == 90
    assert {device.num_sms, device.smem_bytes_per_cta, device.registers_per_sm, device.l2_bytes} == {1000}
    assert device.dram_gbps == 0.9 * 2 * 1000 * (1000 / 8) / 1e6  # 1000 kHz, 1000 bits
    assert set(Device._fields) - set(told) == {"l2_gbps", "mma_tflops", "launch_us"}
    assert not arguments_of(calls, "cuDevicePrimaryCtxRetain"), "a question makes no context"


def test_driver_tells_of_no_device_that_the_kernels_do_not_run_on(warm_up):
    _, (error,) = warm_up(function="device", capability="80")
    assert error.startswith("mla_fp8_device: device must have compute capability 9.0 (H100, H200), got 8.0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_device_without_a_driver_is_an_error_that_names_it():
    text = ctypes.create_string_buffer(1024)
    assert ctypes.CDLL(str(_native.LIBRARY)).mla_fp8_device(0, text, len(text)) == 1
    assert text.value.decode().startswith("mla_fp8_device: the CUDA driver must be installed, got libcuda.so.1")


@pytest.mark.parametrize("name", [*IMAGES, "sm90/unknown", "bmm"])
def test_library_tells_what_is_embedded(name):
    library = ctypes.CDLL(str(_native.LIBRARY))
    library.mla_fp8_embedded_image.restype = ctypes.c_void_p
    size = ctypes.c_size_t()
    address = library.mla_fp8_embedded_image(name.encode(), ctypes.byref(size))
    fatbin_magic = (0xBA55ED50).to_bytes(4, "little")
    there = name in IMAGES and fatbin_magic in _native.LIBRARY.read_bytes()
    assert (address is not None) == (size.value > 0) == there
    if address is not None:
        assert ctypes.string_at(address, size.value).startswith(fatbin_magic)
