"""select_config: a tile for every supported problem, a reason for every dropped one, values in every error."""

import ast
import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_fp8 import _config
from mla_fp8._config import Device, Op, Problem, candidates, select_config, tiles
from mla_fp8.config import forced_tile

SWEPT_PROBLEMS = 1_000_000
CSRC = Path(__file__).parents[2] / "csrc"
MAX_GRID_X = 2**31 - 1
HOPPER_SMEM_BYTES = 227 * 1024
PRODUCTS = [Op.bmm, Op.absorb_q, Op.v_up]
EVERY_OP = [Op.quantize_q_nope, *PRODUCTS]


def problem(op: Op, **extents: int) -> Problem:
    """A supported problem of DeepSeek-V3's decode, with some extents replaced."""
    defaults = {"s": 17, "heads": 128, "n": 512, "k": 128, "in_bytes": 1 if op == Op.bmm else 2}
    defaults["out_bytes"] = 1 if op == Op.quantize_q_nope else 2
    return Problem(op=op, **(defaults | extents))


def test_phased_tile_where_all_ctas_run_at_once_only():
    """A CTA an SM: with one head more than SMs, some would wait for others that cannot have begun."""
    num_sms = Device().num_sms
    assert select_config(problem(Op.absorb_q, s=2048, heads=num_sms)).tile.phased
    assert not select_config(problem(Op.absorb_q, s=2048, heads=num_sms + 1)).tile.phased


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Runs tests/config/sweep_configs.cpp, built here from csrc/config -> what each line of its output says."""
    program = tmp_path_factory.mktemp("sweep") / "sweep_configs"
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O2", *os.environ.get("CXXFLAGS", "").split()]
    sources = [Path(__file__).with_name("sweep_configs.cpp"), *CSRC.glob("config/[!m]*.cpp")]  # not the module
    subprocess.run([*compiler, f"-I{CSRC}", "-o", program, *sources, "-pthread"], check=True, timeout=80)

    def run(*arguments):
        result = subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, text=True)
        return [json.loads(line) for line in result.stdout.splitlines()]

    return run


def test_sweep_finds_a_fitting_candidate_for_a_million_problems(record_property, sweep):
    (report,) = sweep("random", SWEPT_PROBLEMS, 0, 1, HOPPER_SMEM_BYTES)
    (memo,) = sweep("memo", 100_000)
    record_property("memo_ns", f"hit {memo['hit_ns']:.0f}, miss {memo['miss_ns']:.0f}")
    print(f"{report['problems']} problems, memo hit {memo['hit_ns']:.0f} ns, miss {memo['miss_ns']:.0f} ns")
    assert report["failed"] == 0, "\n".join(report["failures"])
    assert report["problems"] == SWEPT_PROBLEMS
    assert report["kept"] >= report["problems"]
    assert report["dropped"] > 0


def test_corners_have_fitting_candidates(sweep):
    (report,) = sweep("corners")
    assert report["failed"] == 0, "\n".join(report["failures"])
    assert report["problems"] > 100_000


def test_sweep_notices_broken_promises(sweep):
    # No product fits so small a device: the sweep must say so, not pass.
    (report,) = sweep("random", 1000, 0, 1, 1024)
    assert report["failed"] > 0
    assert "1024 bytes of shared memory" in report["failures"][0]


@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize("k", [128, 256, 384])
def test_k_128_yields_stages(op, k):
    # DeepGEMM, April 2025: stage candidates were filtered by `s <= k // 128`, so k < 384 left none and an assert fired.
    for s in (0, 1, 17, 128, 4096):
        config = select_config(problem(op, k=k, s=s))
        assert config.tile.stages >= 1
        assert config.tile.smem_bytes <= HOPPER_SMEM_BYTES


@settings(deadline=None, max_examples=300)
@given(
    op=st.sampled_from(EVERY_OP),
    s=st.integers(0, 2**31 - 1) | st.integers(0, 300),
    heads=st.integers(1, 4096),
    n=st.integers(1, 128).map(lambda groups: 128 * groups),
    k=st.integers(1, 128).map(lambda groups: 128 * groups),
    align_bytes=st.sampled_from([2, 4, 8, 16]),
)
def test_winner_covers_the_problem_and_costs_least(op, s, heads, n, k, align_bytes):
    asked = problem(op, s=s, heads=heads, n=n, k=k, align_bytes=align_bytes)
    winner = select_config(asked)
    tile = winner.tile
    columns = k if op == Op.quantize_q_nope else n
    assert winner.tiles == math.ceil(s / tile.m) * math.ceil(columns / tile.n) * heads
    assert 0 <= winner.grid_x <= min(MAX_GRID_X, winner.tiles)
    assert (winner.grid_x == 0) == (s == 0)
    assert tile.smem_bytes <= HOPPER_SMEM_BYTES
    assert tile.align_bytes <= align_bytes
    kept = [candidate.config for candidate in candidates(asked) if candidate.kept]
    assert winner.modelled_us == min(config.modelled_us for config in kept)


@pytest.mark.parametrize("op", EVERY_OP)
def test_no_rows_launch_nothing(op):
    config = select_config(problem(op, s=0))
    assert (config.grid_x, config.tiles, config.modelled_bytes, config.modelled_us) == (0, 0, 0, 0)


def test_quantize_covers_the_padded_rows():
    config = select_config(problem(Op.quantize_q_nope, s=1, m=1024, heads=3))
    assert config.tiles * config.tile.m >= 1024 * 3


def test_modelled_bytes_count_each_operand_once():
    # Weights fit L2 here, so: 2 S H D + H R D (1 + 4 / 128^2) + 2 S H R + 4 S H P for absorb_q with q_pe.
    s, h, d, r, p = 17, 128, 128, 512, 64
    want = 2 * s * h * d + h * r * d * (1 + 4 / 128**2) + 2 * s * h * r + 4 * s * h * p
    assert select_config(problem(Op.absorb_q, s=s, heads=h, n=r, k=d, pe=p)).modelled_bytes == pytest.approx(want)


def test_times_grow_with_rows():
    for op in EVERY_OP:
        times = [select_config(problem(op, s=2**exponent)).modelled_us for exponent in range(31)]
        assert times == sorted(times)


@pytest.mark.parametrize("op", EVERY_OP)
def test_dropped_candidates_say_why(op):
    unaligned = problem(op, k=256, n=384, align_bytes=1 if op == Op.bmm else 2)
    dropped = [
        candidate for candidate in candidates(unaligned, Device(smem_bytes_per_cta=70_000)) if not candidate.kept
    ]
    assert dropped
    for candidate in dropped:
        assert candidate.reason
        if candidate.config.tile.align_bytes == 16:
            assert f"aligned to 16 bytes, these are aligned to {unaligned.align_bytes}" in candidate.reason


def test_every_tile_wins_or_is_dropped_with_its_limit():
    small = Device(smem_bytes_per_cta=20_000, threads_per_sm=64, registers_per_sm=1000)
    for candidate in candidates(problem(Op.absorb_q), small):
        tile = candidate.config.tile
        assert not candidate.kept
        assert f"needs {tile.threads} threads, an SM has 64" in candidate.reason
        assert f"{tile.threads} x {tile.regs} registers, an SM has 1000" in candidate.reason
        assert (f"needs {tile.smem_bytes} bytes of shared memory" in candidate.reason) == (tile.smem_bytes > 20_000)


@pytest.mark.parametrize("op", EVERY_OP)
def test_tiles_of_another_architecture_are_dropped(op):
    elsewhere = Device(capability=120)
    reason = "is for compute capability 9.0, the device has 12.0"
    for candidate in candidates(problem(op), elsewhere):
        assert not candidate.kept and candidate.reason.startswith(reason)
    with pytest.raises(ValueError, match=f"{select_config(problem(op)).tile.symbol} {reason}"):
        select_config(problem(op), elsewhere)


REFUSED = [
    ({"s": -1}, "s must be in [0, 2147483647], got -1"),
    ({"s": 2**31}, "s must be in [0, 2147483647], got 2147483648"),
    ({"heads": 0}, "heads must be in [1, 536870911], got 0"),
    ({"heads": -3}, "heads must be in [1, 536870911], got -3"),
    ({"n": 130}, "n must be a multiple of 128 in [128, 16384], got 130"),
    ({"n": 0}, "n must be a multiple of 128 in [128, 16384], got 0"),
    ({"n": 16512}, "n must be a multiple of 128 in [128, 16384], got 16512"),
    ({"k": 0}, "k must be a multiple of 128 in [128, 16384], got 0"),
    ({"k": 64}, "k must be a multiple of 128 in [128, 16384], got 64"),
    ({"k": 16512}, "k must be a multiple of 128 in [128, 16384], got 16512"),
    ({"pe": 8}, "pe must be a multiple of 16 in [0, 256], got 8"),
    ({"pe": 272}, "pe must be a multiple of 16 in [0, 256], got 272"),
    ({"m": 1}, "m must be 0, got 1"),
    ({"in_bytes": 4}, "in_bytes must be 2, got 4"),
    ({"terms": 0}, "terms must be in [1, 3], got 0"),
    ({"terms": 4}, "terms must be in [1, 3], got 4"),
    ({"out_bytes": 4}, "out_bytes must be in [1, 2], got 4"),
    ({"align_bytes": 1}, "align_bytes must be in [2, 16], got 1"),
    ({"align_bytes": 12}, "align_bytes must be a power of 2, got 12"),
]


@pytest.mark.parametrize(("fault", "rule"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else "")
@pytest.mark.parametrize("function", [select_config, candidates])
def test_rejects_unsupported_problems_with_every_value(function, fault, rule):
    asked = problem(Op.absorb_q, **fault)
    with pytest.raises(ValueError, match=re.escape(f"absorb_q: {rule} (no kernel for s=")) as caught:
        function(asked)
    message = str(caught.value)
    for name in ("s", "heads", "n", "k", "pe", "in_bytes", "terms", "out_bytes", "align_bytes"):
        assert f"{name}={getattr(asked, name)}" in message
    assert "132 SMs" in message
    assert "232448 bytes of shared memory a CTA" in message


def test_rejects_several_faults_at_once():
    with pytest.raises(ValueError, match="got -1.*got 130.*got 0.*got 0"):
        select_config(problem(Op.absorb_q, s=-1, n=130, k=0), Device(num_sms=0))


def test_rejects_a_device_that_is_too_small_with_every_reason():
    with pytest.raises(ValueError, match="bmm: no kernel for s=17") as caught:
        select_config(problem(Op.bmm), Device(smem_bytes_per_cta=4096))
    for tile in tiles():
        if tile.op == Op.bmm:
            assert f"{tile.symbol} needs {tile.smem_bytes} bytes of shared memory, the device has 4096" in str(
                caught.value
            )


@pytest.mark.parametrize("speed", ["dram_gbps", "l2_gbps", "mma_tflops"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_rejects_impossible_speeds(speed, value):
    with pytest.raises(ValueError, match=f"{speed} must be positive and finite"):
        select_config(problem(Op.v_up), Device(**{speed: value}))


def test_rejects_unknown_keywords_and_types():
    with pytest.raises(TypeError, match="unknown keyword rows"):
        Problem(rows=1)
    with pytest.raises(TypeError, match="s must fit its C\\+\\+ type, got 'many'"):
        Problem(s="many")
    with pytest.raises(TypeError, match=str(2**63)):
        Problem(s=2**63)


def test_deterministic_whatever_was_asked_before():
    asked = [problem(op, s=s, heads=heads) for op in EVERY_OP for s in range(0, 600, 7) for heads in (1, 16, 128)]
    first = [repr(select_config(one)) for one in asked]
    assert [repr(select_config(one)) for one in reversed(asked)] == first[::-1]


def test_the_device_is_part_of_the_question():
    big, small = Device(), Device(num_sms=16)
    asked = problem(Op.absorb_q, s=512)
    assert select_config(asked, big).waves < select_config(asked, small).waves
    assert repr(select_config(asked, big)) == repr(select_config(asked))


def test_threads_agree(sweep):
    reports = sweep("random", 20_000, 1, 4, HOPPER_SMEM_BYTES)
    assert len(reports) == 4
    assert all(report == reports[0] for report in reports)
    assert reports[0]["failed"] == 0


def test_reprs_show_values():
    asked = problem(Op.absorb_q)
    assert "s=17, heads=128, n=512, k=128" in repr(asked)
    assert asked == problem(Op.absorb_q)
    assert asked != problem(Op.absorb_q, s=18)
    assert f"symbol='{select_config(asked).tile.symbol}'" in repr(select_config(asked))
    assert "smem_bytes_per_cta=232448" in repr(Device())


def test_stub_names_what_the_module_has():
    stub = Path(__file__).parents[2] / "mla_fp8" / "_config.pyi"
    defined = {node.name: node for node in ast.parse(stub.read_text()).body if hasattr(node, "name")}
    assert set(defined) == {name for name in dir(_config) if not name.startswith("_")}
    for name, node in defined.items():
        members = {member.name: member for member in getattr(node, "body", ()) if isinstance(member, ast.FunctionDef)}
        if fields := getattr(getattr(_config, name), "_fields", None):
            assert [member for member in members if not member.startswith("_")] == list(fields), name
        if "__init__" in members:
            assert [keyword.arg for keyword in members["__init__"].args.kwonlyargs] == list(fields), name


def test_forced_tile_rejects_a_symbol_that_is_not_compiled():
    with (
        pytest.raises(ValueError, match="symbol must be one of absorb_q_few16, .*, got 'absorb_q_n64'"),
        forced_tile("absorb_q_n64"),
    ):
        pass
