"""`explain` models the GPU that is here: by a stand-in for the library's function and for torch's answers."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from mla_fp8 import _native
from mla_fp8.__main__ import main
from mla_fp8.config import Device, device_limits, explain, select_config

# An H200's: its DRAM is faster, and some problems have another tile there.
H200 = {"num_sms": 132, "smem_bytes_per_cta": 232448, "dram_gbps": 4815.0, "l2_bytes": 62914560.0}


@pytest.fixture
def gpu(monkeypatch):
    """gpu(text, failed) -> the library says so of cuda:1, which torch's current device is then."""

    def say(text, failed=0):
        def device(index, into, size):
            assert (index.value, size.value) == (1, len(into)) and len(text) < size.value
            ctypes.memmove(into, text.encode() + b"\0", len(text) + 1)
            return failed

        monkeypatch.setattr(_native, "_functions", SimpleNamespace(mla_fp8_device=device))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", {1: "NVIDIA H200"}.get)

    return say


def h200() -> str:
    return " ".join(f"{name}={value:.17g}" for name, value in H200.items())


def values(device: Device) -> dict:
    return {name: getattr(device, name) for name in Device._fields}


def test_device_limits_are_the_library_s_and_else_an_h100_s(gpu):
    gpu(h200())
    assert values(device_limits(1)) == values(Device()) | H200
    assert isinstance(device_limits(1).num_sms, int)


def test_device_limits_raises_what_the_library_says(gpu):
    gpu("device must have compute capability 9.0", failed=1)
    with pytest.raises(RuntimeError, match=r"^device must have compute capability 9\.0$"):
        device_limits(1)


def test_explain_models_the_gpu_that_is_here(gpu):
    gpu(h200())
    for s in (1, 17, 64, 100, 200, 333, 512, 4096):
        here = explain("absorb_q", s, 128, pe=64)
        assert here.modelled_on == "this NVIDIA H200"
        assert here.winner.config.tile.symbol == select_config(here.problem, Device(**H200)).tile.symbol
    assert "modelled on this NVIDIA H200: 132 SMs" in " ".join(str(here).split()) and "4,815 GB/s" in str(here)
    assert here.to_dict()["device"]["dram_gbps"] == 4815.0


def test_explain_without_a_supported_gpu_says_so(gpu, monkeypatch):
    gpu("device must have compute capability 9.0", failed=1)
    assert explain("bmm", 1, 128).modelled_on == "an H100 (no supported GPU here)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = explain("bmm", 1, 128)
    assert (found.modelled_on, values(found.device)) == ("an H100 (no supported GPU here)", values(Device()))


def test_explain_command_takes_a_gpu_by_name_or_index(gpu, capsys):
    gpu(h200())
    command = ["explain", "--op", "absorb_q", "--s", "17"]
    for options, said in (
        ([], "modelled on this NVIDIA H200: 132 SMs, "),
        (["--device", "h100"], "modelled on an H100: 132 SMs, "),
        (["--device", "1"], "modelled on cuda:1: 132 SMs, "),
        (["--device", "1", "--device", "num_sms=78"], "modelled on 78 SMs, "),
        (["--device", "num_sms=78"], "modelled on 78 SMs, "),
    ):
        assert main([*command, *options]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert said in printed
        assert ("3,000 GB/s" if "h100" in options else "4,815 GB/s") in printed


def test_explain_command_on_a_device_that_is_not_supported(gpu, capsys):
    gpu("device must be one of 1", failed=1)
    assert main(["explain", "--op", "bmm", "--s", "1", "--device", "1"]) == 1
    assert capsys.readouterr() == ("", "error: device must be one of 1\n")
