"""`python -m mla_fp8 check --weights`: the errors of each way on a checkpoint's layer."""

import json

import pytest
import torch
from checkpoints import LAYER, SCALE, WEIGHT, config, write_checkpoint
from helpers import random_weight

from mla_fp8.__main__ import main
from mla_fp8.cli import losses

HEADS = 4
# Normal weights and activations, 131,072 outputs and more: rounding to bf16 alone is 1.66e-3 in the mean square of the
# mantissas that sums of normal numbers have, and a sample this large is within a few percent of it.
ROUNDING = (1.6e-3, 1.75e-3)
FP8_NOISE = (2.4e-2, 2.8e-2)  # one rounding of normal data to e4m3: 2.6e-2


@pytest.fixture
def checkpoint(rng, tmp_path):
    values, scale = random_weight(rng, 1, HEADS * 256, 512)
    return write_checkpoint(tmp_path / "checkpoint", {WEIGHT: values[0], SCALE: scale[0]}, config(heads=HEADS))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()  # the seed's line
    code = main(["check", "--device", "cpu", *arguments])
    return code, *capsys.readouterr()


def test_check_weights_measures_every_way(capsys, checkpoint):
    code, out, err = run(capsys, "--weights", str(checkpoint), "--layer", str(LAYER), "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert [(row["op"], row["activations"]) for row in rows] == [
        (op, kind) for op in ("absorb_q", "v_up") for kind in losses.KINDS
    ]
    for row in rows:
        assert ROUNDING[0] < row["rounding"] < ROUNDING[1]
        assert row["exact"] < 1.06 * row["rounding"] < row["torch_bmm"] < row["fp8"]
        if row["activations"] == "normal":
            assert FP8_NOISE[0] < row["fp8"] < FP8_NOISE[1]


def test_check_weights_prints_a_table(capsys, checkpoint):
    code, out, _ = run(capsys, "--weights", str(checkpoint), "--layer", str(LAYER))
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) <= 80
    assert lines[0].split() == ["cpu", "activations", "exact", "fp8", "torch.bmm", "rounding"]
    assert [line.split()[0] for line in lines[1:7]] == ["absorb_q"] * 3 + ["v_up"] * 3
    assert "least there is" in " ".join(lines) and "FAIL" not in out


def test_check_weights_fails_where_exact_is_not(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(losses, "v_up", lambda x, w, w_scale, **_: losses.absorb_q(x, w, w_scale, activations="fp8"))
    code, out, _ = run(capsys, "--weights", str(checkpoint), "--layer", str(LAYER))
    said = " ".join(out.split())
    assert code == 1 and "FAIL: exact is over 1.25 times rounding: " in said
    assert "<lambda>, normal, on cpu" in said and "absorb_q, normal" not in said


def test_check_weights_of_nan_fails(capsys, rng, tmp_path):
    values, scale = random_weight(rng, 1, HEADS * 256, 512)
    values.view(torch.uint8)[0, 3, 5] = 0x7F
    write_checkpoint(tmp_path / "nan", {WEIGHT: values[0], SCALE: scale[0]}, config(heads=HEADS))
    code, _, _ = run(capsys, "--weights", str(tmp_path / "nan"), "--layer", str(LAYER))
    assert code == 1


@pytest.mark.parametrize(
    ("directory", "layer", "text"),
    [
        ("nowhere", LAYER, "check: --weights must be an existing directory"),
        ("checkpoint", 0, "check: --layer must be one of the checkpoint in "),
    ],
)
def test_check_weights_names_what_is_missing(capsys, tmp_path, checkpoint, directory, layer, text):
    code, out, err = run(capsys, "--weights", str(tmp_path / directory), "--layer", str(layer))
    assert (code, out) == (2, "") and err.startswith("error: check: ") and text in err
