"""`python -m mla_fp8` as a new user meets it: no arguments, wrong ones, narrow terminals, closed pipes."""

import os
import subprocess
import sys

import processes
import pytest
import torch
from checkpoints import config, kv_b_proj, write_checkpoint

import mla_fp8
from mla_fp8.__main__ import main

COMMANDS = ["info", "check", "bench", "explain", "convert"]
EXPLAIN = ["explain", "--op", "absorb_q", "--s", "17"]


@pytest.fixture
def checkpoint(tmp_path, rng, capsys):
    tensors = dict(zip(("weight", "weight_scale_inv"), kv_b_proj(rng), strict=True))
    named = {f"model.layers.0.self_attn.kv_b_proj.{name}": tensor for name, tensor in tensors.items()}
    capsys.readouterr()  # the seed's line
    return str(write_checkpoint(tmp_path / "checkpoint", named, config()))


def test_no_command_prints_the_help(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and all(f"    {command} " in err for command in COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mla_fp8 {mla_fp8.__version__}\n"


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)], ids=" ".join)
def test_help_fits_80_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("bench --s 0", "--s: must be 1 or more, got '0'"),
        ("bench --heads 0-3", "--heads: must be 1 or more, got '0-3'"),
        ("bench --rounds 1", "--rounds: must be an integer in [2, 1000000], got '1'"),
        ("bench --activations bf16", "--activations: invalid choice: 'bf16' (choose from 'exact', 'fp8')"),
        ("bench --threads 0", "--threads: must be an integer in [1, 1024], got '0'"),
        ("check --seed -1", "--seed: must be an integer in [0, 9223372036854775807], got '-1'"),
        ("check --seed many", "--seed: must be an integer in [0, 9223372036854775807], got 'many'"),
        ("explain --op bmm --s 99999999999999999999", "--s: must be an integer in ["),
        (
            "explain --op bmm --s 1 --device num_sms",
            "--device: must be h100, an index or NAME=VALUE, as in num_sms=114 (--help lists NAMEs), got 'num_sms'",
        ),
        (
            "explain --op v_up --s 1 --activations int4",
            "--activations: invalid choice: 'int4' (choose from 'exact', 'fp8')",
        ),
        ("explain --op softmax --s 1", "--op: invalid choice: 'softmax' (choose from "),
    ],
)
def test_wrong_values_are_named_with_their_rule(capsys, words, text):
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    assert text in capsys.readouterr().err.splitlines()[-1]


def test_convert_into_a_file_says_so(capsys, tmp_path, checkpoint):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["convert", checkpoint, str(out)]) == 1
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: convert: OUT must be a directory or a place for one, got {out}: [Errno ")


def test_narrow_terminal_cuts_nothing_short(capsys, monkeypatch, tmp_path, checkpoint):
    monkeypatch.setenv("COLUMNS", "30")
    shown = {" shared512       115,712 ": EXPLAIN, "  quantize_q_nope  cpu  C++  ": ["info"]}
    shown["layer_000.safetensors  "] = ["convert", checkpoint, str(tmp_path / "out")]
    for text, command in shown.items():
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert "…" not in printed and text in printed


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
@pytest.mark.parametrize("command", [["info"], EXPLAIN], ids=["info", "explain"])
def test_closed_pipe_is_no_traceback(command, options):
    """As `| head` leaves it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mla_fp8", *command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), said) in ((1, ""), (141, ""))  # rich ends with 1


def test_no_color_is_heeded_on_a_terminal():
    pytest.importorskip("rich", reason="an optional extra, which `make test` installs")
    command = [sys.executable, "-m", "mla_fp8", *EXPLAIN]
    _, printed = processes.run_on_terminal(command, os.environ | {"NO_COLOR": "1"})
    assert "\x1b[1m" in printed and not any(f"\x1b[3{n}" in printed or f"\x1b[1;3{n}" in printed for n in range(8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_check_without_a_gpu_says_what_is_missing(capsys):
    assert main(["check", "--device", "cuda"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "nothing was checked: no device here runs the ops"
    assert all("skipped: " in line for line in printed[:5])
