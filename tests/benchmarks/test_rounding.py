"""benchmarks.quality.rounding: what docs/numerics.md claims of its record, and a small case measured again."""

import pytest
import torch

from benchmarks.bench import report
from benchmarks.quality import rounding

ONE_SIGN = "positive, weights too"
RECORD = report.read(report.RESULTS / "rounding.json")


def test_record_has_every_case_at_its_size():
    cases = [(str(dtype)[6:], kind, k) for dtype in rounding.DTYPES for kind in rounding.KINDS for k in rounding.WIDTHS]
    assert [(row["dtype"], row["kind"], row["k"]) for row in RECORD] == cases
    assert all(row["outputs"] >= rounding.OUTPUTS for row in RECORD)


@pytest.mark.parametrize("row", [row for row in RECORD if row["dtype"] == "bfloat16" and row["kind"] != ONE_SIGN],
                         ids=lambda row: f"{row['kind']}-{row['k']}")  # fmt: skip
def test_record_of_exact_bf16_is_near_rounding_alone(row):
    assert row["exact"] <= 1.06 * row["rounding"]
    assert row["exact"] < row["bmm"]
    assert abs(row["bias"]) < 1e-4


@pytest.mark.parametrize("dtype", rounding.DTYPES, ids=str)
def test_rounding_measures_what_the_record_says(dtype):
    torch.manual_seed(1)
    row = rounding.measure("normal", dtype, 128, 8192)
    recorded = next(one for one in RECORD if (one["dtype"], one["kind"], one["k"]) == (row.dtype, row.kind, row.k))
    for name in rounding.COLUMNS:
        assert getattr(row, name) == pytest.approx(recorded[name], rel=0.15), name  # 8,192 outputs, 16 scales
