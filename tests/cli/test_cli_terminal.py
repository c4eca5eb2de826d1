"""The commands print the same with rich and without it, and a terminal gets colours only from rich."""

import os
import sys

import processes
import pytest
from checkpoints import config, kv_b_proj, write_checkpoint

from mla_fp8 import text
from mla_fp8.__main__ import main
from mla_fp8.cli import check, suite
from mla_fp8.cli.terminal import Terminal, progress

ESCAPE = "\x1b"
EXPLAIN = ["explain", "--op", "absorb_q", "--s", "17", "--device", "h100"]
WITHOUT_RICH = "import sys; sys.modules['rich'] = None; from mla_fp8.__main__ import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def without_rich(monkeypatch):
    """A function that takes rich away, until the test ends."""

    def take_away():
        for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, "rich", None)

    return take_away


@pytest.fixture
def commands(tmp_path, rng, monkeypatch):
    tensors = dict(zip(("weight", "weight_scale_inv"), kv_b_proj(rng), strict=True))
    named = {f"model.layers.0.self_attn.kv_b_proj.{name}": tensor for name, tensor in tensors.items()}
    checkpoint = str(write_checkpoint(tmp_path / "checkpoint", named, config()))
    monkeypatch.setattr(suite, "SETTINGS", suite.SETTINGS[:1])
    monkeypatch.setattr(check.time, "perf_counter", lambda: 0.0)
    return [["info"], ["check", "--device", "cpu"], EXPLAIN, ["convert", checkpoint, str(tmp_path / "out"), "--force"]]


def test_commands_print_the_same_without_rich(capsys, commands, without_rich):
    printed = []
    for take_away in (lambda: None, without_rich):
        take_away()
        capsys.readouterr()
        assert [main(command) for command in commands] == [0, 0, 0, 0]
        printed.append(capsys.readouterr())
    assert printed[0] == printed[1]
    for part in ("What a call runs", "PASS: 16 cases", "is selected", "layer_000.safetensors", "1 verified"):
        assert part in printed[1].out


@pytest.mark.parametrize("color", ["rich", "plain"])
def test_only_rich_colours_a_terminal(color):
    if color == "rich":
        pytest.importorskip("rich", reason="an optional extra, which `make test` installs")
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    program = ["-m", "mla_fp8"] if color == "rich" else ["-c", WITHOUT_RICH]
    status, printed = processes.run_on_terminal([sys.executable, *program, *EXPLAIN], environment)
    assert status == 0 and "is selected" in printed
    assert (ESCAPE in printed) == (color == "rich")


def test_bench_without_rich_says_how_to_get_it(capsys, without_rich):
    without_rich()
    assert main(["bench", "--device", "cpu"]) == 2
    assert capsys.readouterr() == ("", "error: bench: the benchmarks need rich: pip install mla_fp8[cli]\n")


def test_progress_without_rich_is_silent(capsys, without_rich):
    without_rich()
    with progress("write", total=2) as advance, Terminal().working("waiting"):
        advance("write")
    assert capsys.readouterr() == ("", "")


def test_table_columns_are_as_wide_as_their_cells():
    rows = [("op", "bytes"), ("bmm", "7"), ("absorb_q", "1,234")]
    lines = text.table(rows, align="<>", width=80, flexible=0, indent=" ")
    assert lines == [[" op        bytes"], [" bmm           7"], [" absorb_q  1,234"]]


def test_table_wraps_the_flexible_column_only():
    rows = [("a", "one two three", "x"), ("b", "one", "y")]
    assert text.table(rows, align="<<<", width=13, flexible=1) == [["a  one two  x", "   three"], ["b  one      y"]]
    (longest,) = text.table([("abcdefgh", "1")], align="<<", width=6, flexible=0)
    assert longest == ["abc  1", "def", "gh"]


def test_wrap_keeps_every_line_within_its_width():
    assert text.wrap("a-b-c efghijkl", 7, "  ") == ["  a-b-c", "  efghi", "  jkl"]
    assert text.wrap("", 6) == [""]
