"""benchmarks/decode_step.py without a GPU: what it checks, what it says of backends that are not there, its table."""

import itertools
import sys
import types
from dataclasses import asdict
from pathlib import Path

import processes
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import attention_backends  # noqa: E402
import decode_case  # noqa: E402
import decode_step  # noqa: E402
import report  # noqa: E402
import tables  # noqa: E402
from attention_backends import Shape  # noqa: E402
from rich.console import Console  # noqa: E402

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

    monkeypatch.setitem(attention_backends.BACKENDS, "flashinfer", ("FlashInfer", broken))
    monkeypatch.setattr(attention_backends, "load", lambda name: f"ModuleNotFoundError: No module named '{name}'")
    rows = checked(["flash_mla", "flashinfer", "torch"]).rows
    assert rows["flash_mla"].status == "not installed" and "sgl-flash-mla" in rows["flash_mla"].reason
    assert (rows["flashinfer"].status, rows["flashinfer"].reason) == ("failed", "RuntimeError: needs another GPU")
    assert rows["torch"].status == "ok"


def on_pages(q, pages, table, lengths, scale):
    """Attention over a cache [pages, 64, 576] in fp64, by each sequence's row of page numbers."""
    results = []
    for one, numbers, length in zip(q, table, lengths, strict=True):
        keys = pages[numbers.long()].flatten(0, 1)[:length].double()
        results.append(((one.double() @ keys.T) * scale).softmax(-1) @ keys[:, :512])
    return torch.stack(results).to(q.dtype)


class FakeFlashMLA(types.ModuleType):
    """Takes what flash_mla.flash_mla_with_kvcache documents for dense decoding, and checks it."""

    def get_mla_metadata(self, *_, **__):
        return "schedule", None

    def flash_mla_with_kvcache(
        self, q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
        softmax_scale=None, causal=False, is_fp8_kvcache=None, use_legacy=False,
    ):  # fmt: skip
        assert use_legacy and not causal and (tile_scheduler_metadata, num_splits) == ("schedule", None)
        assert q.is_contiguous() and q.shape[1] == 1 and k_cache.shape[1:] == (64, 1, 576) and head_dim_v == 512
        assert block_table.dtype == cache_seqlens.dtype == torch.int32
        return on_pages(q[:, 0], k_cache[:, :, 0], block_table, cache_seqlens, softmax_scale).unsqueeze(1), None


class FakeFlashInfer(types.ModuleType):
    """The same of flashinfer.mla.BatchMLAPagedAttentionWrapper."""

    class BatchMLAPagedAttentionWrapper:
        def __init__(self, float_workspace_buffer):
            assert float_workspace_buffer.numel() == 128 << 20

        def plan(
            self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size,
            causal, sm_scale, q_data_type, kv_data_type,
        ):  # fmt: skip
            assert (head_dim_ckv, head_dim_kpe, page_size, causal) == (512, 64, 64, False)
            assert q_data_type == kv_data_type == torch.bfloat16 and len(qo_indptr) == len(kv_len_arr) + 1
            assert {x.dtype for x in (qo_indptr, kv_indptr, kv_indices, kv_len_arr)} == {torch.int32}
            table = [kv_indices[begin:end] for begin, end in itertools.pairwise(kv_indptr)]
            self.plans = table, kv_len_arr, sm_scale, num_heads

        def run(self, q_nope, q_pe, ckv_cache, kpe_cache, out=None):
            table, lengths, scale, heads = self.plans
            assert q_nope.shape[1] == heads and out.shape == q_nope.shape
            q, pages = torch.cat([q_nope, q_pe], -1), torch.cat([ckv_cache, kpe_cache], -1)
            out.copy_(on_pages(q, pages, table, lengths, scale))


@pytest.mark.parametrize("name, fake", [("flash_mla", FakeFlashMLA), ("flashinfer", FakeFlashInfer)])
def test_libraries_get_what_they_document(monkeypatch, name, fake):
    monkeypatch.setattr(attention_backends, "load", fake)
    row = checked([name]).rows[name]
    assert row.status == "ok" and row.relative_error < decode_case.ATTENTION_TOLERANCE, row


@pytest.mark.parametrize("fault", ["scale", "last sequence", "rope", "nothing written"])
def test_check_finds_a_wrong_attention(monkeypatch, fault):
    def wrong(shape):
        def attend(q, cache, o_latent):
            if fault == "nothing written":
                return o_latent
            if fault == "rope":
                q = torch.cat([q[..., :512], torch.zeros_like(q[..., 512:])], -1)
            o_latent = attention_backends.pytorch(shape)(q * (1.1 if fault == "scale" else 1), cache, o_latent)
            if fault == "last sequence":
                o_latent[-1] = o_latent[0]
            return o_latent

        return attend

    monkeypatch.setitem(attention_backends.BACKENDS, "torch", ("wrong", wrong))
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
    assert "\nFlashMLA: not installed: ModuleNotFoundError" in filled and "abc" in filled


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmark_says_that_it_needs_a_gpu():
    result = processes.run([sys.executable, ROOT / "benchmarks" / "decode_step.py", "--quick"])
    assert result.returncode == 2 and "needs a CUDA device" in result.stdout


def test_benchmark_rejects_a_context_that_is_no_number_of_pages():
    result = processes.run([sys.executable, ROOT / "benchmarks" / "decode_step.py", "--context", "100"])
    assert result.returncode == 2 and "--context must be a multiple of 64, got 100" in result.stderr
