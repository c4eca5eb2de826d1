"""`python -m mla_fp8 bench`: which script it runs with what, and that a row can be measured again."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mla_fp8.__main__ import main, parser
from mla_fp8.cli import bench, facts

ROOT = Path(__file__).resolve().parents[2]
PEERS = [f"{dtype} bmm {layout}" for dtype in ("fp32", "bf16") for layout in ("[H,K,N]", "[H,N,K]ᵀ")]
SMALL = ["--device", "cpu", "--s", "1,3", "--heads", "1,2", "--rounds", "5", "--threads", "1"]


def arguments_of(*words: str) -> list[str]:
    """What the script gets, after its name."""
    given = parser().parse_args(["bench", *words])
    return (bench.gpu_command if given.device == "cuda" else bench.cpu_command)(given)


def test_bench_gives_the_gpu_script_its_options():
    files = ["--json", "a.json", "--plot", "a.svg"]
    given, mode = ["--heads", "128,16", "--sides", "front576,back", "--quick"], ["--activations", "fp8"]
    script, *options = arguments_of("--device", "cuda", "--s", "1,16-17", "--rounds", "9", *mode, *given, *files)
    assert Path(script) == ROOT / "benchmarks" / "gpu.py"
    assert options == [*given, "--s", "1,16,17", "--replays", "9", *mode, *files]


def test_bench_gives_the_cpu_script_its_options():
    words = ["--device", "cpu", "--sides", "back", "--s", "1,16", "--quick"]
    script, *options = arguments_of(*words)
    assert Path(script) == ROOT / "benchmarks" / "cpu.py"
    assert options == ["--op", "v_up", "--heads", "128", "--s", "1", "16", "--rounds", "10"]
    assert "--activations exact" in " ".join(arguments_of(*words, "--activations", "exact"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--device cpu --sides gemm", "bench: --sides must be front or back on cpu, got gemm"),
        ("--device cuda --threads 2", "bench: --threads must be left out on cuda"),
        ("--device cuda", "bench: --device must be cpu, got cuda: torch is away"),
    ],
)
def test_bench_rejects_options_of_the_other_device(capsys, monkeypatch, words, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "--threads" in words)
    monkeypatch.setattr(facts, "no_cuda", lambda: "torch is away")
    assert main(["bench", *words.split()]) == 2
    assert text in capsys.readouterr().err


def test_bench_without_its_scripts_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "mla_fp8" / "cli" / "bench.py"))
    assert main(["bench", "--device", "cpu"]) == 2
    assert "the benchmarks must be in" in capsys.readouterr().err


def test_bench_finds_installed_scripts_first(monkeypatch, tmp_path):
    installed = tmp_path / "mla_fp8" / "benchmarks"
    installed.mkdir(parents=True)
    (installed / "gpu.py").touch()
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "mla_fp8" / "cli" / "bench.py"))
    assert bench.directory() == installed


def test_bench_asks_for_files_before_it_measures(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.subprocess, "run", lambda *_: pytest.fail("measures"))
    (tmp_path / "file").touch()
    for option, file, rule in (
        ("--json", tmp_path / "file" / "rows.json", "must be a file that can be written"),
        ("--json", tmp_path, "must be a file that can be written"),
        ("--plot", tmp_path / "file" / "rows.svg", "must be a file that can be written"),
        ("--plot", tmp_path / "rows.xyz", "must end in .svg or .png"),
    ):
        assert main(["bench", "--device", "cpu", option, str(file)]) == 2
        assert capsys.readouterr().err == f"error: bench: {option} {rule}, got {file}\n"
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--device", "cpu", "--plot", "rows.svg"]) == 2
    assert "--plot needs matplotlib: pip install mla_fp8[bench]" in capsys.readouterr().err


def test_bench_names_peers():
    text = bench.peers()
    assert [part.split()[0] for part in text.split("; ")] == ["Triton", "DeepGEMM", "FlashInfer", "humming"]
    assert bench._version("torch") == torch.__version__
    assert bench._version("no_such_module") == "not installed"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A small run in a process of its own, as a user would start it -> what it printed, and its JSON file."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("bench")
    files = ["--json", str(folder / "rows.json"), "--plot", str(folder / "rows.svg")]
    command = [sys.executable, "-m", "mla_fp8", "bench", *SMALL, *files]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout, json.loads((folder / "rows.json").read_text()), (folder / "rows.svg").read_text()


def test_bench_measures_every_case(measured):
    printed, values, _ = measured
    cases = [(row["op"], row["contender"], row["s"], row["heads"]) for row in values["rows"]]
    names = [(op, name) for op in ("absorb_q", "v_up") for name in (f"mla_fp8.{op}", "fp8 activations", *PEERS)]
    assert sorted(cases) == sorted((*name, s, h) for name in names for s in (1, 3) for h in (1, 2))
    assert all(row["ms"] > 0 and row["samples"] == 5 for row in values["rows"])
    assert printed.startswith("cpu: mla_fp8 ") and "\x1b" not in printed


def test_bench_errors_are_from_exact_arithmetic(measured):
    printed, values, _ = measured
    for row in values["rows"]:
        low, high = (0, 1e-5) if "fp32" in row["contender"] else (1.2e-3, 2.2e-3)  # few rows: the mean scatters
        if "bf16 bmm" in row["contender"]:
            low, high = 1.8e-3, 3e-3  # of the weights and of the result
        if row["contender"] == "fp8 activations":
            low, high = 1.5e-2, 4e-2
        assert low < row["error"] < high, row
    assert "error from exact arithmetic" in printed and "target" not in printed


def test_bench_draws_every_contender(measured):
    _, values, drawing = measured
    assert drawing.lstrip().startswith("<?xml")
    assert drawing.count('id="axes_') == 4  # two ops, two numbers of heads


def test_bench_rows_say_how_to_measure_them_again(measured):
    printed, values, _ = measured
    for row in values["rows"]:
        words = shlex.split(row["reproduce"])
        assert words[:4] == ["python", "-m", "mla_fp8", "bench"] and f"again: {row['reproduce']}\n" in printed
        given = parser().parse_args(words[3:])
        assert (given.device, given.s, given.heads, given.rounds, given.threads) == (
            "cpu",
            [row["s"]],
            [row["heads"]],
            5,
            1,
        )
        assert bench.CPU_OPS[given.sides] == row["op"]


@pytest.mark.gpu
def test_bench_runs_on_the_gpu(tmp_path):
    options = ["--quick", "--s", "16", "--heads", "128", "--sides", "front576", "--json", str(tmp_path / "rows.json")]
    ran = subprocess.run(
        [sys.executable, "-m", "mla_fp8", "bench", *options], capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    own = next(row for row in rows if row["ours"])
    assert own["us"] > 0
    assert own["reproduce"] == (
        "python -m mla_fp8 bench --device cuda --sides front576 --s 16 --heads 128 --rounds 10 --quick"
    )
