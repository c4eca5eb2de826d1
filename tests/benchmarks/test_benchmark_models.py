"""The benchmarks of whole layers, small and on a CPU: they run, and find a result that is wrong."""

import json
import sys
from pathlib import Path

import processes
import pytest
import torch

pytest.importorskip("transformers", "5.15", "an optional extra, which `make test` installs")
from benchmarks.bench import report, tables  # noqa: E402
from benchmarks.layers import prefill, tensor_parallel  # noqa: E402
from mla_fp8.integrations.absorbed_layer import DIMS, absorbed_is_cheaper  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = ["--batch", "2", "--context", "64", "--heads", "4", "--hidden", "128"]


def run(module, *options):
    return processes.run([sys.executable, "-m", f"benchmarks.layers.{module}", *options], cwd=ROOT)


@pytest.mark.xdist_group("distributed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks meet over gloo only where there is no GPU")
def test_tensor_parallel_step_equals_one_rank(tmp_path):
    result = run("tensor_parallel", "--ranks", "1,2", *SMALL, "--json", tmp_path / "rows.json")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert [row["ranks"] for row in rows] == [1, 2]
    assert rows[0]["error"] == 0 < rows[1]["error"] < tensor_parallel.BOUND and all(row["us"] > 0 for row in rows)
    assert rows[0]["command"].endswith("--ranks 1,2 " + " ".join(SMALL))


def test_tensor_parallel_rejects_ranks_that_do_not_divide_the_heads():
    result = run("tensor_parallel", "--ranks", "3")
    assert result.returncode == 2 and "--ranks must divide 128 heads" in result.stderr and "got 3" in result.stderr


@torch.no_grad()
def test_prefill_finds_where_the_ways_cross(monkeypatch):
    """By given times: absorbed costs a query 3 µs, expanded 50 and 1 a query, so they cross behind 25 queries."""
    layer = prefill.layer_of(2, CPU)
    monkeypatch.setattr(prefill, "both", lambda layer, queries, *_: (3.0 * queries, 50.0 + queries))
    row = prefill.crossover(layer, 128, CPU)
    assert (row["queries"], row["absorbed_us"], row["expanded_us"]) == (26, 78.0, 76.0)
    dims = [getattr(layer, dim) for dim in DIMS]
    assert absorbed_is_cheaper(row["rule"] - 1, 128, *dims) and not absorbed_is_cheaper(row["rule"], 128, *dims)
    assert prefill.crossover(layer, 20, CPU)["queries"] == 21, "never within 20 tokens"


@torch.no_grad()
def test_prefill_runs_both_ways_and_finds_a_wrong_one(monkeypatch):
    layer = prefill.layer_of(2, CPU)
    assert all(us > 0 for us in prefill.both(layer, 3, 70, CPU))
    calls, attend = [], prefill.attention_forward

    def wrong(layer, *arguments, **options):
        calls.append(layer.mla_fp8.prefill_threshold)
        result, weights = attend(layer, *arguments, **options)
        return (result * (1.1 if layer.mla_fp8.prefill_threshold == 1 else 1), weights)

    monkeypatch.setattr(prefill, "attention_forward", wrong)
    with pytest.raises(ValueError, match="3 queries on 70 tokens: the ways differ by"):
        prefill.both(layer, 3, 70, CPU)
    assert calls == [4, 1]


PREFILL = [
    {"launched": launched, "heads": 16, "tokens": 512, "queries": queries, "rule": 78}
    for launched, queries in (("graph", 73), ("eager", 35))
]
HERE = {"gpu": "a GPU", "torch": "2", "commit": "abc", "date": "2026-01-01"}


@pytest.mark.parametrize(
    "name, rows, line",
    [
        (
            "tensor_parallel",
            [
                {"ranks": n, "batch": b, "us": 90.0 * b / n, "heads": 8, "hidden": 64, "context": 9}
                for n in (1, 2)
                for b in (1, 64)
            ],
            "| 2 | 45.0 (2.00x) | 2880 (2.00x) |",
        ),
        ("prefill", PREFILL, "| 16 | 512 | 73 | 35 | 78 |"),
    ],
)
def test_tables_show_records_of_layers(tmp_path, name, rows, line):
    report.write_json(tmp_path / f"{name}.json", rows, HERE)
    filled = tables.fill(f"<!-- table: {name} -->\nnot measured\n<!-- end -->\n", tmp_path)
    assert line in filled.splitlines() and "a GPU, 2, abc, 2026-01-01" in filled and "not measured" not in filled
