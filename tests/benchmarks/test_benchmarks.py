"""The parts of the GPU benchmark that need no GPU: bytes, checks, tables. Own ops and torch.bmm run on the CPU."""

import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from rich.console import Console

from benchmarks import record, tiles
from benchmarks.bench import contenders, measure, report, roofline, sides, tables, timing, triton_calls
from mla_fp8.config import Device, select_config

ROOT = Path(__file__).resolve().parents[2]
H100_L2_BYTES = 50 << 20
HERE = {"gpu": "none", "driver": "0", "torch": "2", "commit": "abc", "date": "2026-01-01", "command": "python gpu.py"}


def checked_case(side, s=5, heads=3):
    case = measure.Case(sides.SIDES[side], s, heads, device="cpu")
    with torch.no_grad():
        case.check(quick=False)
    return case


def timed_rows():
    """As after a run: ours, the floor, a peer, and one that failed."""
    names = [("mla_fp8 absorb_q", True, 5.0), ("floor", False, 4.5), ("torch.bmm", False, 8.0)]
    rows = [measure.Row("front512", 1, 128, name, own, us=us, us_p20=us, us_p80=us) for name, own, us in names]
    rows[0].relative_error, rows[-1].relative_error = 1.7e-3, 2.4e-3
    return [*rows, measure.Row("front512", 1, 128, "other", status="failed", reason="RuntimeError: too old")]


@pytest.mark.parametrize(
    ("side", "read_bytes", "written_bytes"),
    [
        ("front512", 128 * 2, 512 * 2),
        ("front576", 192 * 2, 576 * 2),
        ("front576_fp8", 192 * 2, 576),
        ("back", 512 * 2, 128 * 2),
        ("back_fp8", 512 * 2, 128 + 4),
        ("gemm", 128 + 4, 512 * 2),
    ],
)
def test_side_counts_the_bytes_that_cannot_be_avoided(side, read_bytes, written_bytes):
    side, weights = sides.SIDES[side], 128 * (512 * 128 + 4 * 4)
    assert side.read_bytes(7, 128) == 7 * 128 * read_bytes
    assert side.written_bytes(7, 128) == 7 * 128 * written_bytes
    assert side.bytes(7, 128) == 7 * 128 * (read_bytes + written_bytes) + weights


@pytest.mark.parametrize("s", [1, 16, 128, 1024, 65536])
@pytest.mark.parametrize("side", list(sides.SIDES))
def test_rotation_exceeds_l2_three_times(side, s):
    for heads in (8, 128):
        footprint = sides.SIDES[side].bytes(s, heads)
        assert sides.rotation(footprint, H100_L2_BYTES) * footprint >= 3 * H100_L2_BYTES


@pytest.mark.parametrize("sets", [1, 5, 19, 200])
def test_launches_use_every_set_equally_often(sets):
    for moved_bytes in (0, 10**8, 10**11):
        launches = timing.launches_for(moved_bytes, sets)
        assert launches >= sets and launches % sets == 0


@pytest.mark.parametrize("shape", triton_calls.SHAPES, ids=str)
def test_floor_covers_every_word(shape):
    tile = shape.warps * 32 * 4
    for counts in [(2_097_152, 8192, 32768), (2_097_152, 1_048_576, 4_718_592), (0, 1024, 1), (16, 16, 16)]:
        programs, tiles = triton_calls.split(counts, shape)
        for count, each in zip(counts, tiles, strict=True):
            assert programs * each * tile >= count


@pytest.mark.parametrize("side", list(sides.SIDES))
def test_check_passes_own_ops_and_torch(side):
    case = checked_case(side)
    ran = {name for name, row in case.rows.items() if row.status == "ok"}
    assert {name for name, row in case.rows.items() if row.ours} <= ran
    for name in ran:
        assert case.rows[name].relative_error < case.rows[name].tolerance


@pytest.mark.parametrize("side", ["front512", "front576", "back"])
def test_check_measures_errors_from_exact_arithmetic(side):
    """Exact activations lose the rounding of the result alone, torch.bmm that of the weights too, and FP8 both."""
    rows = {name: row.relative_error for name, row in checked_case(side, 32, 4).rows.items() if row.status == "ok"}
    exact, fp8, *_ = rows.values()
    bmm = min(error for name, error in rows.items() if "torch.bmm" in name)
    assert 1.2e-3 < exact < 1.8e-3 and 1.2 < bmm / exact < 1.7 and 2e-2 < fp8 < 3e-2


@pytest.mark.parametrize("activations, names", [("exact", ["mla_fp8 v_up"]), ("fp8", ["mla_fp8 v_up, fp8"])])
def test_check_takes_one_kind_of_activations(activations, names):
    case = measure.Case(sides.SIDES["back"], 3, 2, device="cpu", activations=(activations,))
    with torch.no_grad():
        case.check(quick=False)
    assert [name for name, row in case.rows.items() if row.ours] == [*names, "mla_fp8 quantize_q_nope + bmm"]


def test_check_keeps_what_is_not_installed():
    rows = checked_case("front512").rows
    missing = rows["quant + DeepGEMM masked GEMM"]
    assert (missing.status, missing.us) == ("not installed", None) and "deep_gemm" in missing.reason


@pytest.mark.parametrize("fault", ["writes nothing", "leaves one element", "is off by 10%"])
def test_check_stops_at_a_wrong_result(monkeypatch, fault):
    def call(b):
        if fault != "writes nothing":
            b.out.copy_(torch.einsum("shk,hnk->shn", b.x.double(), b.w_exact) * (1.1 if "10%" in fault else 1))
        if fault == "leaves one element":
            b.out[-1, -1, -1] = float("nan")

    monkeypatch.setattr(contenders, "torch_bmm", lambda side: [contenders.Contender("faulty", call)])
    with pytest.raises(measure.WrongResult, match="faulty"):
        checked_case("front512")


def test_check_reports_an_op_that_raises(monkeypatch):
    def call(b):
        raise RuntimeError("absorb_q: no kernel\nfor this device")

    monkeypatch.setattr(contenders, "ours", lambda side, _: [contenders.Contender("mla_fp8 absorb_q", call, ours=True)])
    row = checked_case("front512").rows["mla_fp8 absorb_q"]
    assert (row.status, row.reason) == ("failed", "RuntimeError: absorb_q: no kernel")


def test_table_shows_failures_last_with_their_reason():
    console = Console(width=150)
    with console.capture() as capture:
        report.show(console, timed_rows(), report.origin(HERE))
    text = capture.get()
    assert "error" in text and "2.4e-03" in text
    assert "1.60x" in text and "other: failed: RuntimeError: too old" in text
    assert text.index("torch.bmm") < text.index("other")


def test_json_rows_say_where_they_come_from(tmp_path):
    report.write_json(tmp_path / "new" / "rows.json", timed_rows(), HERE)
    rows = report.read(tmp_path / "new" / "rows.json")
    assert len(rows) == 4
    for row in rows:
        assert row.items() >= HERE.items()


@pytest.mark.parametrize(
    ("script", "started"),
    [
        ("/somewhere/benchmarks/gpu.py", "benchmarks/gpu.py"),
        ("benchmarks/gpu.py", "benchmarks/gpu.py"),
        ("gpu.py", "benchmarks/gpu.py"),
        ("/somewhere/benchmarks/layers/prefill.py", "-m benchmarks.layers.prefill"),
    ],
)
def test_json_rows_name_the_command_without_its_files(monkeypatch, script, started):
    words = [script, "--s", "1,16", "--json", "out/rows.json", "--quick", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", [*words, "--plot", "out/rows.svg", "--heads", "16"])
    assert report.environment("abc")["command"] == f"python {started} --s 1,16 --quick --heads 16"


def test_every_record_has_a_command():
    gpus = {record.file_of("gpu", name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")}
    files = gpus | {record.file_of(name, "NVIDIA H100 80GB HBM3") for name in record.COMMANDS | record.IN_AN_ENGINE}
    assert {path.name for path in record.RESULTS.glob("*.json")} <= files


@pytest.mark.parametrize("name", list(record.COMMANDS))
def test_record_gives_a_script_options_that_it_takes(name):
    if name in ("prefill", "quality"):
        pytest.importorskip("transformers", "5.15", "an optional extra, which `make test` installs")
    *module, script = shlex.split(record.COMMANDS[name].replace("-m ", ""))[0].removesuffix(".py").split("/")
    *_, words = record.COMMANDS[name].replace("-m ", "").partition(" ")
    script = importlib.import_module(".".join([*module, script]))
    given = script.parser().parse_args([*shlex.split(words), "--json", "rows.json"])
    assert given.json == Path("rows.json")


def test_record_goes_on_after_a_failure(monkeypatch, capsys, tmp_path):
    done = []

    def run(command, cwd):
        assert cwd == ROOT
        done.append(command[1:])
        return subprocess.CompletedProcess(command, int("tiles.py" in command[1]))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["record.py", "tiles", "host", "--into", str(tmp_path), "--commit", "abc"])
    assert record.main() == 1
    scripts = [Path(command[0]).name for command in done]
    assert scripts == ["tiles.py", "gpu.py"]
    assert done[1][1:] == ["--host", "--json", str(tmp_path / "host.json"), "--commit", "abc"]
    assert "tiles: status 1" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["record.py", "everything"])
    with pytest.raises(SystemExit):
        record.main()
    assert "got everything" in capsys.readouterr().err


def test_tables_fill_their_blocks_and_nothing_else(tmp_path):
    report.write_json(tmp_path / "h100.json", timed_rows(), HERE)
    text = "before\n<!-- table: gpu -->\nstale\n<!-- end -->\nafter\n<!-- table: cpu -->\nkept\n<!-- end -->\n"
    filled = tables.fill(text, tmp_path)
    assert "| **absorb_q, [S,H,512] bf16** | **5.00** | **1.7e-3** |\n" in filled
    assert "| fastest of the others | 8.00 (1.60x) | 2.4e-3 |\n" in filled and "abc" in filled
    assert "stale" not in filled and "kept" in filled and filled.startswith("before\n") and "\nafter\n" in filled
    assert tables.fill(filled, tmp_path) == filled
    with pytest.raises(ValueError, match="got tpu"):
        tables.fill("<!-- table: tpu -->\n<!-- end -->\n", tmp_path)


def test_tables_name_every_run_that_their_rows_come_from(tmp_path):
    rows = timed_rows()
    for name, facts in (("one", {"commit": "abc", "date": "today"}), ("two", {"commit": "def", "date": "then"})):
        report.write_json(tmp_path / name, [*rows], HERE | facts)
    (tmp_path / "rows.json").write_text((tmp_path / "one").read_text() + (tmp_path / "two").read_text())
    assert ", abc, def, today, then.\n" in tables.fill("<!-- table: rows -->\n<!-- end -->\n", tmp_path)


def test_cpu_table_reads_the_file_of_the_cpu_benchmark(tmp_path):
    row = {"op": "absorb_q", "s": 1, "heads": 128, "contender": "mla_fp8.absorb_q", "ms": 0.5, "ratio": 0.25}
    (tmp_path / "cpu.json").write_text(json.dumps({"cpu": "a CPU", "threads": 2, "rows": [row]}))
    filled = tables.fill("<!-- table: cpu -->\n<!-- end -->\n", tmp_path)
    assert "| **absorb_q** | **0.50 (0.25)** |\n" in filled and "2 threads. a CPU" in filled


def test_roofline_bounds_every_recorded_point():
    points = roofline.points(report.read(ROOT / "benchmarks" / "results" / "h100.json"))
    assert len(points) == len(sides.SIDES) * len({point.s for point in points})
    for point in points:
        assert 50 < point.percent < 101 and point.roof_tflops < roofline.PEAK_TFLOPS, point


def test_roofline_counts_flops_and_bytes():
    row = {"side": "front512", "s": 2, "heads": 128, "contender": "mla_fp8 absorb_q", "gpu": "", "bytes": 1 << 20,
           "us": 4.0, "gbps": 100.0, "percent_of_stream": 50.0}  # fmt: skip
    (point,) = roofline.points([row])
    flops = 2 * 2 * 128 * 128 * 512
    assert (point.intensity, point.tflops) == (flops / (1 << 20), flops / 4e6)
    assert point.roof_tflops == point.intensity * 200 / 1e3


def test_roofline_plot_is_that_of_the_records(tmp_path):
    pytest.importorskip("matplotlib")
    roofline.draw(tmp_path / "roofline.svg", report.read(ROOT / "benchmarks" / "results" / "h100.json"))
    drawn, committed = (path.read_text() for path in (tmp_path / "roofline.svg", ROOT / "docs" / "roofline.svg"))
    for kind in (r"<text [^>]*>([^<]*)</text>", r"<use [^>]*x=\"(\d+)[^>]*y=\"(\d+)"):  # words; marks, to a pixel
        assert re.findall(kind, drawn) == re.findall(kind, committed)


def test_readme_has_the_measured_tables():
    result = processes.run([sys.executable, "-m", "benchmarks.bench.tables", "--check"], cwd=ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmark_says_that_it_needs_a_gpu():
    result = processes.run([sys.executable, ROOT / "benchmarks" / "gpu.py", "--quick"])
    assert result.returncode == 2 and "needs a CUDA device" in result.stdout


@pytest.fixture(scope="module")
def pools():
    return tiles.Pools("cpu", divisor=256)


@pytest.mark.parametrize("side", list(sides.SIDES))
def test_tiles_check_passes_own_ops(pools, side):
    pools.begin()
    buffers = tiles.PooledBuffers(pools, sides.SIDES[side], 5, 3)
    tiles.check(contenders.ours(sides.SIDES[side])[0], buffers, ["absorb_q_shared512"], side)


@pytest.mark.parametrize("fault", ["wrong", "other bits", "other scales"])
def test_tiles_check_finds_a_wrong_tile(pools, fault):
    """A call for the reference, then one for the tile: the second is wrong, or both."""
    side, calls = sides.SIDES["back_fp8"], []
    right = contenders.ours(side)[0]

    def call(buffers):
        calls.append(right.call(buffers))
        if fault == "wrong":
            buffers.out_group_scale.mul_(1.1)
        elif len(calls) == 2:
            name, dtype = ("out", torch.uint8) if fault == "other bits" else ("out_group_scale", torch.int32)
            getattr(buffers, name).view(dtype)[-1, -1] += 1

    pools.begin()
    buffers = tiles.PooledBuffers(pools, side, 5, 3)
    with pytest.raises(measure.WrongResult, match="relative error" if fault == "wrong" else "v_up_few8 gives other"):
        tiles.check(dataclasses.replace(right, call=call), buffers, ["v_up_few8"], "back_fp8")


def test_pools_begin_again_at_their_end(pools):
    pools.begin()
    size = len(pools.memory["w"]) // 3 // tiles.ALIGN_BYTES * tiles.ALIGN_BYTES
    begins = [pools.cut("w", size, dtype=torch.uint8).data_ptr() for _ in range(4)]
    assert [begin - begins[0] for begin in begins] == [0, size, 2 * size, 0]
    pools.cut("w", 1, dtype=torch.uint8)
    assert pools.cut("w", 1, dtype=torch.uint8).data_ptr() - begins[0] == size + tiles.ALIGN_BYTES


@pytest.fixture
def fake_clock(monkeypatch, pools):
    """No GPU: graphs are their first call, and every name's time its length."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(tiles, "Pools", lambda: pools)
    monkeypatch.setattr(tiles, "device_limits", Device)
    monkeypatch.setattr(tiles, "l2_bytes", lambda: 1 << 20)
    monkeypatch.setattr(timing, "capture", lambda calls, launches, firsts=None: calls[0]())
    monkeypatch.setattr(timing, "interleave", lambda names, n: {name: [float(len(name))] * n for name in names})


@pytest.mark.parametrize(("activations", "peers"), [("exact", {"torch.bmm kn", "torch.bmm nk"}), ("fp8", set())])
def test_tiles_measure_every_tile_and_torch_beside_exact(fake_clock, pools, activations, peers):
    row = tiles.compare(pools, sides.SIDES["front576"], 3, 2, activations, Device())
    names = row["us"] | row["probed_us"]
    problem = sides.SIDES["front576"].problem(3, 2, activations)
    kept = [one.config.tile for one in tiles.candidates(problem) if one.kept]
    assert {tile.symbol for tile in kept if tile.align_bytes == 16} | peers == set(names)
    assert row["chosen"] in row["us"] and all(us == len(name) for name, us in names.items())
    assert set(row["probed_us"]) == {n for n in names if len(n) >= tiles.SLOW * min(map(len, names))} - {row["chosen"]}


def test_tiles_go_on_where_they_were_cut_off(fake_clock, monkeypatch, tmp_path):
    """First within no budget, then one case; then more beside it, which keeps its row; then from the start."""

    def cases(*words):
        monkeypatch.setattr(sys, "argv", ["tiles.py", "--json", str(file), "--sides", "front512", "--commit", *words])
        status = tiles.main()
        rows = report.read(file) if file.exists() else []
        return status, [(row["heads"], row["s"], row["activations"], row["commit"]) for row in rows]

    file = tmp_path / "new" / "tiles.json"
    monkeypatch.setattr(tiles, "LIMIT", 99)
    assert cases("a", "--budget-s", "-1") == (3, [])
    assert cases("a", "--s", "1", "--heads", "2", "--activations", "fp8") == (0, [(2, 1, "fp8", "a")])
    more = [(2, 1, "exact", "b"), (2, 3, "exact", "b"), (2, 3, "fp8", "b")]
    assert cases("b", "--s", "1,3", "--heads", "2", "--resume") == (0, [(2, 1, "fp8", "a"), *more])
    assert cases("c", "--s", "3", "--heads", "2") == (0, [(2, 3, "exact", "c"), (2, 3, "fp8", "c")])


def test_tiles_list_is_the_published_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tiles.py", "--list"])
    assert tiles.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14 * 19 * (5 * 2 + 1), "both kinds of activations, but gemm's, which are FP8"
    assert [line.split() for line in lines[:2]] == [["front512", mode, "H=4", "S=1"] for mode in ("exact", "fp8")]
    text = (ROOT / "docs" / "configuration.md").read_text().replace("\n", " ")
    for name, numbers in (("H", tiles.HEADS), ("S", tiles.S)):
        assert f"{name} in {', '.join(map(str, numbers))}" in text, "the page has the list"


def test_tiles_table_shows_the_worst_choice_what_a_tile_is_for_and_faster_peers(tmp_path):
    case = {"side": "front512", "heads": 128, "s": 1, "gpu": "NVIDIA H100 80GB HBM3", "torch": "2", "date": "today"}
    case["activations"] = "exact"
    case["device"] = {"num_sms": 1}  # of the GPU that was measured: the choice is another than on a whole H100
    chosen = select_config(sides.SIDES["front512"].problem(1, 128), Device(num_sms=1)).tile.symbol
    assert chosen != select_config(sides.SIDES["front512"].problem(1, 128)).tile.symbol
    us = {chosen: 5.0, "fast": 4.0, "torch.bmm kn": 4.5, "torch.bmm nk": 9.0}
    rows = [{**case, "us": us, "probed_us": {"slow": 8.0}}, {**case, "s": 10**6, "us": {"fast": 9.0}}]
    (tmp_path / "tiles.json").write_text("\n".join(map(json.dumps, rows)))
    filled = tables.fill("<!-- table: tiles -->\n<!-- end -->\n", tmp_path)
    worst = f"H = 128, S = 1: 1.250, {chosen} beside fast"
    assert worst in filled and "not measured" in filled and "| H = 128, S = 1: 1.11 |\n" in filled
    assert f"| fast | 1 | 1.25x {chosen}: absorb_q, [S,H,512] bf16, exact, H = 128, S = 1, 4.00 µs |\n" in filled
    assert "| slow | 0 |  |\n" in filled and "NVIDIA H100 80GB HBM3, 2, None, today" in filled
