"""layers/decode_step.py without a GPU: what it checks, what it says of backends that are not there, its table."""

import sys
from dataclasses import asdict
from pathlib import Path

import processes
import pytest
import torch
from fake_attention import FakeFlashInfer, FakeFlashMLA
from rich.console import Console

from benchmarks.bench import report, tables
from benchmarks.layers import decode_case, decode_step
from benchmarks.layers.decode_case import Shape
from mla_fp8.attention import backends

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "benchmarks.layers.decode_step"]
H100_L2_BYTES = 50 << 20
HERE = {"gpu": "none", "driver": "0", "torch": "2", "commit": "abc", "date": "2026-01-01"}
FULL_SIZE = [
    Shape(batch, context, heads, "cpu") for batch in (1, 128) for context in (1024, 32768) for heads in (16, 128)
]


def checked(backends, batch=5, context=128, heads=2):
    case = decode_case.Case(Shape(batch, context, heads, "cpu"), backends)
    with torch.no_grad():
        case.check()
    return case


def timed(us):
    """A case with times as after a run: µs by row; others keep what the check said."""
    case = checked(["torch", "flash_mla"])
    for name, value in us.items():
        case.rows[name].us = case.rows[name].us_p20 = case.rows[name].us_p80 = case.rows[name].gbps = value
        case.rows[name].share = value / sum(us.values())
    return case


def test_check_passes_own_ops_and_attention():
    case = checked(["torch"])
    for row in case.rows.values():
        assert row.status == "ok" and 0 <= row.relative_error < row.tolerance, row


def test_check_says_what_is_not_installed_and_what_fails(monkeypatch):
    def broken(shape):
        raise RuntimeError("needs another GPU\nat least")

    monkeypatch.setitem(decode_case.BACKENDS, "flashinfer", ("FlashInfer", broken))
    rows = checked(["flash_mla", "flashinfer", "torch"]).rows
    assert rows["flash_mla"].status == "not installed" and "sgl-flash-mla" in rows["flash_mla"].reason
    assert (rows["flashinfer"].status, rows["flashinfer"].reason) == ("failed", "RuntimeError: needs another GPU")
    assert rows["torch"].status == "ok"


@pytest.mark.parametrize("name, fake", [("flash_mla", FakeFlashMLA), ("flashinfer", FakeFlashInfer)])
def test_libraries_get_what_they_document(monkeypatch, name, fake):
    monkeypatch.setattr(backends, "load", fake)
    row = checked([name]).rows[name]
    assert row.status == "ok" and row.relative_error < decode_case.ATTENTION_TOLERANCE, row


@pytest.mark.parametrize("fault", ["scale", "last sequence", "rope", "nothing written"])
def test_check_finds_a_wrong_attention(monkeypatch, fault):
    def wrong(shape):
        def attend(q, cache):
            if fault == "nothing written":
                return torch.full((*q.shape[:2], 512), float("nan"), dtype=q.dtype)
            if fault == "rope":
                q = torch.cat([q[..., :512], torch.zeros_like(q[..., 512:])], -1)
            o_latent = decode_case.pytorch(shape)(q * (1.1 if fault == "scale" else 1), cache)
            if fault == "last sequence":
                o_latent[-1] = o_latent[0]
            return o_latent

        return attend

    monkeypatch.setitem(decode_case.BACKENDS, "torch", ("wrong", wrong))
    assert checked(["torch"]).rows["torch"].status == "wrong"


def test_check_finds_a_wrong_op(monkeypatch):
    monkeypatch.setattr(decode_case.Step, "up", lambda self, o_latent=None: self.back.out.zero_())
    rows = checked(["torch"]).rows
    assert rows["v_up"].status == "wrong" and rows["absorb_q"].status == "ok"
    assert "v_up behind it" in rows["torch"].reason


@pytest.mark.parametrize("shape", FULL_SIZE, ids=str)
def test_sets_exceed_l2_three_times(monkeypatch, shape):
    monkeypatch.setattr(decode_case, "make_cache", lambda shape, seed: seed)
    sets = decode_case.make_sets(shape, H100_L2_BYTES)
    caches = {step.cache for step in sets}
    assert len(caches) * shape.cache_bytes >= 3 * H100_L2_BYTES and len(sets) % len(caches) == 0
    for side in (decode_case.FRONT, decode_case.BACK):
        assert len(sets) * side.bytes(shape.batch, shape.heads) >= 3 * H100_L2_BYTES


def test_table_shows_shares_and_what_is_missing(tmp_path):
    case = timed({"absorb_q": 5.0, "torch": 12.0, "v_up": 3.0})
    console = Console(width=120)
    with console.capture() as capture:
        decode_step.show(console, case)
    assert "60.0%" in capture.get() and "attention: FlashMLA: not installed" in capture.get()
    report.write_json(tmp_path / "decode_step.json", map(asdict, case.rows.values()), HERE)
    filled = tables.fill("<!-- table: decode_step -->\n<!-- end -->\n", tmp_path)
    assert "| 2, 5, 128 | 5.00 | **12.0** | not installed | 3.00 | 25% / 60% / 15% |  |\n" in filled
    assert "\nFlashMLA: not installed: No module named" in filled and "abc" in filled


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmark_says_that_it_needs_a_gpu():
    result = processes.run([*COMMAND, "--quick"], cwd=ROOT)
    assert result.returncode == 2 and "needs a CUDA device" in result.stdout


def test_benchmark_rejects_a_context_that_is_no_number_of_pages():
    result = processes.run([*COMMAND, "--context", "100"], cwd=ROOT)
    assert result.returncode == 2 and "--context must be a multiple of 64, got 100" in result.stderr
