"""`python -m mla_fp8 info`: what it says is what the library, the cache and the devices are."""

import contextlib
import io
import json
import platform
import sys

import pytest
import torch

import mla_fp8
from mla_fp8 import _native, jit
from mla_fp8.__main__ import main
from mla_fp8.cli import facts, info
from mla_fp8.cli.terminal import Terminal
from mla_fp8.config import Op, tiles
from mla_fp8.explain.problem import DEFAULT_EXTENTS

CUDA = {"device": "cuda:0", "name": "a GPU", "capability": "9.0", "sms": 132, "memory_bytes": 80 << 30}
IMAGES = [{"image": "sm90/bmm", "kernels": 4, "bytes": 100}]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mla_fp8").mkdir()
    return tmp_path / "mla_fp8"


def shown(values: dict) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        info.show(values, Terminal())
    return printed.getvalue()


def test_info_json_holds_the_values(capsys):
    assert main(["info", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["versions"]["mla_fp8"] == mla_fp8.__version__
    assert values["versions"]["torch"] == torch.__version__
    assert values["versions"]["python"] == platform.python_version()
    assert values["library"] == str(_native.LIBRARY)
    assert [device["device"] for device in values["devices"]][0] == "cpu"
    assert len(values["devices"]) == 1 + torch.cuda.device_count()
    on_cpu = {row["op"]: row["path"] for row in values["paths"] if row["device"] == "cpu"}
    assert on_cpu == dict.fromkeys(DEFAULT_EXTENTS, "C++")


def test_info_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if str(_native.LIBRARY) not in line and "cache" not in line) <= 80
    assert not any("\x1b" in line or "…" in line for line in lines)


def test_info_asks_the_library_what_is_embedded(monkeypatch):
    monkeypatch.setattr(_native, "embedded_image", lambda name: b"image" if name == "sm90/bmm" else b"")
    assert facts.embedded() == [
        {"image": "sm90/bmm", "kernels": sum(tile.op == Op.bmm for tile in tiles()), "bytes": 5}
    ]


def test_info_agrees_with_the_build():
    """The library of this build has all images or none, each with all kernels of its op."""
    found = facts.embedded()
    assert {image["image"] for image in found} in (set(), {f"sm90/{tile.op.name}" for tile in tiles()})
    for image in found:
        held = _native.embedded_image(image["image"])
        of_op = [tile.symbol for tile in tiles() if image["image"] == f"sm90/{tile.op.name}"]
        assert all(b"\0.text." + symbol.encode() + b"\0" in held for symbol in of_op)
        assert (image["kernels"], image["bytes"]) == (len(of_op), len(held))


def test_library_embeds_nothing_under_other_names():
    assert _native.embedded_image("sm90/no_such_op") == _native.embedded_image("bmm") == b""


def test_info_tells_current_files_of_the_cache_from_others(cache):
    image = jit.load("sm90/quantize_q_nope")
    (current,) = cache.iterdir()
    (cache / "bmm-0123.cubin").write_bytes(b"of an older release")
    files = {file["file"]: file for file in facts.jit_facts()["files"]}
    assert files[current.name] == {"file": current.name, "bytes": len(image) + 32, "current": True}
    assert files["bmm-0123.cubin"]["current"] is False


def test_info_says_why_there_is_no_nvrtc(cache, monkeypatch):
    def missing(name):
        raise RuntimeError("NVRTC must be there")

    monkeypatch.setattr(jit, "cached_image", missing)
    found = facts.jit_facts()
    assert (found["nvrtc"], found["problem"]) == (None, "NVRTC must be there")


def test_info_path_on_other_devices_is_an_error():
    rows = facts.paths(CUDA | {"capability": "8.9"}, IMAGES)
    assert {(row["path"], row["why"]) for row in rows} == {("error", "compute capability must be 9.0, got 8.9")}


def test_info_path_is_embedded_where_the_driver_takes_it(monkeypatch):
    monkeypatch.setattr(jit, "embedded_refusal", lambda index: "")
    assert {row["path"] for row in facts.paths(CUDA, IMAGES)} == {"embedded"}


@pytest.mark.parametrize("images", [IMAGES, []], ids=["refused", "not embedded"])
def test_info_path_is_nvrtc_where_nothing_embedded_runs(cache, monkeypatch, images):
    monkeypatch.setattr(jit, "embedded_refusal", lambda index: "bmm: no")
    jit.load("sm90/v_up")
    rows = {row["op"]: row for row in facts.paths(CUDA, images)}
    assert {row["path"] for row in rows.values()} == {"NVRTC"}
    reason = "the driver refuses the image" if images else "built without nvcc"
    assert rows["bmm"]["why"] == f"{reason}; compiled at first use"
    assert rows["v_up_quantized"]["why"] == rows["v_up"]["why"] == f"{reason}; in the JIT cache"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_embedded_refusal_is_the_driver_s_own_text():
    assert "the CUDA driver" in jit.embedded_refusal(0)


def test_info_shows_devices_that_agree_on_one_line(monkeypatch):
    monkeypatch.setattr(jit, "embedded_refusal", lambda index: "")
    devices = [facts.cpu_facts(), CUDA, CUDA | {"device": "cuda:1"}]
    paths = [row for device in devices for row in facts.paths(device, IMAGES)]
    values = facts.collect() | {"devices": devices, "paths": paths, "embedded": IMAGES, "no_cuda": ""}
    text = shown(values)
    assert "a GPU, compute capability 9.0, 132 SMs, 80 GiB" in text
    assert text.count("cuda:0-1  embedded  the driver takes the image") == len(DEFAULT_EXTENTS)


@pytest.mark.gpu
def test_info_paths_on_this_gpu(capsys):
    assert main(["info", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    on_gpu = {row["path"] for row in values["paths"] if row["device"] == "cuda:0"}
    assert on_gpu <= ({"embedded", "NVRTC"} if values["embedded"] else {"NVRTC"})
    mla_fp8.quantize_q_nope(torch.zeros(1, 1, 128, dtype=torch.bfloat16, device="cuda"))  # the loader is there again


@pytest.mark.parametrize("held", [True, False], ids=["embedded", "none embedded"])
def test_info_text_without_nvrtc_is_true_where_it_stands(monkeypatch, capsys, held):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # as where cuda-bindings is not installed
    monkeypatch.setattr(facts, "embedded", lambda: IMAGES if held else [])
    assert main(["info"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "not embedded in this build" not in text
    assert ("a GPU that runs the embedded kernels needs none" in text) == held
    assert "NVRTC must be there to compile kernels, where none are embedded or the driver refuses them" in text
