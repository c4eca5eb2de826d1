"""`python -m mla_fp8`: the program itself, and `explain` and what it prints."""

import doctest
import importlib
import json
import os
import subprocess
import sys

import processes
import pytest

from mla_fp8.__main__ import main
from mla_fp8.config import Device, explain

OPS = ["quantize_q_nope", "bmm", "absorb_q", "v_up", "v_up_quantized"]
ESCAPE = "\x1b"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["explain", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_explain_prints_the_table(capsys):
    code, out, err = run(capsys, "--op", "absorb_q", "--s", "17", "--heads", "128")
    assert (code, err) == (0, "")
    winner = explain("absorb_q", s=17, heads=128).winner.config
    marked = [line for line in out.splitlines() if line.startswith("* ")]
    assert len(marked) == 1
    assert marked[0].split()[1] == winner.tile.symbol.removeprefix("absorb_q_")
    assert f"{winner.tile.smem_bytes:,}" in marked[0]
    assert f"{winner.modelled_us:.2f}" in marked[0]
    assert f"{winner.tile.symbol} is selected" in out
    assert "s=17, heads=128, n=512, k=128" in out
    assert "Dropped: " in out


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("s", ["0", "1", "17", "8192", "2147483647"])
@pytest.mark.parametrize("align", ["2", "16"])
def test_explain_fits_80_columns(capsys, op, s, align):
    code, out, _ = run(capsys, "--op", op, "--s", s, "--align", align)
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= 80
    assert ESCAPE not in out
    assert "…" not in out


def test_explain_prints_every_candidate_once(capsys):
    for op in OPS:
        explanation = explain(op, s=100, heads=16)
        _, out, _ = run(capsys, "--op", op, "--s", "100", "--heads", "16")
        words = [word.rstrip(",") for word in out.split()]
        for candidate in explanation.candidates:
            tile = candidate.config.tile
            assert words.count(tile.symbol.removeprefix(f"{tile.op.name}_")) == 1


def test_explain_json_parses(capsys):
    code, out, _ = run(capsys, "--op", "v_up_quantized", "--s", "3", "--json")
    values = json.loads(out)
    assert code == 0
    assert values["problem"]["s"] == 3
    assert values["problem"]["out_bytes"] == 1
    kept = {one["symbol"]: one for one in values["candidates"] if one["kept"]}
    assert values["winner"] in kept
    assert kept[values["winner"]]["modelled_us"] == min(one["modelled_us"] for one in kept.values())
    assert all(one["reason"] for one in values["candidates"] if not one["kept"])


@pytest.mark.parametrize("words, terms", [([], 2), (["--activations", "exact"], 2), (["--activations", "fp8"], 1)])
def test_explain_models_the_activations_asked_for(capsys, words, terms):
    for op in OPS:
        _, out, _ = run(capsys, "--op", op, "--s", "3", "--json", *words)
        assert json.loads(out)["problem"]["terms"] == (1 if op in ("quantize_q_nope", "bmm") else terms)
    _, out, _ = run(capsys, "--op", "v_up", "--s", "3", *words)
    assert f"n=128, k=512, {'fp8' if terms == 1 else 'exact'} activations, 16-bit output" in " ".join(out.split())


def test_explain_takes_three_terms_of_fp16():
    assert explain("v_up", s=3, heads=16, out_dtype="float16").problem.terms == 3
    assert explain("v_up", s=3, heads=16, out_dtype="float16", activations="fp8").problem.terms == 1


def test_explain_no_rows(capsys):
    code, out, _ = run(capsys, "--op", "absorb_q", "--s", "0")
    assert code == 0
    assert "launches nothing" in out


def test_explain_device_settings(capsys):
    code, out, _ = run(capsys, "--op", "absorb_q", "--s", "17", "--device", "num_sms=78", "--device", "dram_gbps=4000")
    assert code == 0
    assert "on 78 SMs" in out
    assert "4,000 GB/s" in out


def test_explain_rejects_unsupported_problems(capsys):
    code, out, err = run(capsys, "--op", "bmm", "--s", "-7", "--n", "130")
    assert (code, out) == (1, "")
    assert "--s must be in [0, 2147483647], got -7; --n must be a multiple of 128 in [128, 16384], got 130" in err


def test_explain_shows_reasons_when_every_tile_is_dropped(capsys):
    code, out, _ = run(capsys, "--op", "bmm", "--s", "7", "--device", "smem_bytes_per_cta=10")
    assert code == 1
    assert "every one is dropped" in out
    assert "bytes of shared memory, the device has 10 a CTA" in " ".join(out.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain"],
        ["explain", "--op", "softmax", "--s", "1"],
        ["explain", "--op", "bmm", "--s", "many"],
        ["explain", "--op", "bmm", "--s", "1", "--device", "colour=3"],
        ["explain", "--op", "bmm", "--s", "1", "--device", "num_sms=many"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m mla_fp8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"op": "softmax"}, "op must be one of .*, got 'softmax'"),
        ({"out_dtype": "int8"}, "out_dtype must be one of .*, got 'int8'"),
        ({"op": "v_up_quantized", "out_dtype": "bfloat16"}, "out_dtype must be float8_e4m3fn"),
        ({"m_alignment": 0}, "m_alignment must be at least 1, got 0"),
        ({"heads": 0}, "heads must be"),
        ({"activations": "int4"}, "explain: activations must be 'exact' or 'fp8', got 'int4'"),
    ],
)
def test_explain_function_rejects(fault, message):
    with pytest.raises(ValueError, match=message):
        explain(**({"op": "absorb_q", "s": 1, "heads": 1} | fault))


def test_explain_function_is_text_and_values():
    explanation = explain(
        "absorb_q", s=17, heads=128, pe=64, out_dtype="torch.float8_e4m3fn", device=Device(num_sms=16)
    )
    assert "e4m3 output" in str(explanation)
    assert "pe=64" in str(explanation)
    assert explanation.to_dict()["device"]["num_sms"] == 16
    assert json.loads(json.dumps(explanation.to_dict())) == explanation.to_dict()


@pytest.mark.parametrize("module", ["device", "explain", "forced_tile", "problem"])
def test_docstring_example_runs(module):
    ran = doctest.testmod(importlib.import_module(f"mla_fp8.explain.{module}"))
    assert ran.attempted > 0
    assert ran.failed == 0


def test_module_runs_as_a_program():
    command = [sys.executable, "-m", "mla_fp8", "explain", "--op", "absorb_q", "--s", "17", "--heads", "128"]
    ran = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "is selected" in ran.stdout
    assert ESCAPE not in ran.stdout


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("safetensors", ["convert", ".", "out"])],
    ids=["safetensors"],
)
def test_missing_dependency_is_one_line(tmp_path, package, arguments):
    (tmp_path / "model.safetensors").touch()
    code = (
        f"import sys; sys.modules[{package!r}] = None; from mla_fp8.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"error: python -m mla_fp8 needs {package}: pip install {package}\n"


def test_interrupt_ends_quietly(monkeypatch, capsys):
    def interrupted(given):
        raise KeyboardInterrupt

    monkeypatch.setattr("mla_fp8.cli.info.run", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == ""


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for command in ("info", "check", "bench", "explain", "convert"):
        assert f"    {command} " in printed


def test_colours_on_a_terminal():
    pytest.importorskip("rich", reason="an optional extra, which `make test` installs")
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    command = [sys.executable, "-m", "mla_fp8", "explain", "--op", "bmm", "--s", "1"]
    status, printed = processes.run_on_terminal(command, environment)
    assert status == 0 and ESCAPE in printed
