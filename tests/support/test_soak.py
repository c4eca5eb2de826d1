"""tests/support/soak.py finds what is planted, and carries its plan from run to run."""

import json

import pytest
import soak
import soak_cases
import torch
from helpers import bits

COUNT = 24
COLUMNS = 80
MIB = 2**20


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A plan that takes a second."""
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setattr(soak_cases, "HEADS", 2)
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(soak_cases.POOL_ELEMENTS, device, 2**16 + 3)
        monkeypatch.setitem(soak_cases.MAX_ROWS, device, 128)


@pytest.fixture
def run(capsys):
    def run(*arguments: str) -> tuple[int, str]:
        """Three passes on the CPU -> exit status, and what was printed."""
        status = soak.main(["--device", "cpu", "--minutes", "0", "--cases", str(COUNT), *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_soak_passes_and_fits_80_columns(run):
    status, printed = run()
    assert status == 0, printed
    assert "3 passes" in printed and f"{3 * COUNT} cases" in printed and "PASS: " in printed
    assert max(map(len, printed.splitlines())) <= COLUMNS


def test_soak_help_fits_80_columns(capsys):
    with pytest.raises(SystemExit):
        soak.main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= COLUMNS


def test_soak_names_a_flipped_bit(run, monkeypatch):
    """In one element of one result of the second pass."""
    in_v_up = lambda case: soak_cases.CASE[case.name].op == "v_up"  # noqa: E731
    case = next(case for case in soak_cases.plan(0, COUNT, "cpu") if in_v_up(case) and case.s > 3)
    original, calls = soak_cases.Call.results, []

    def results(call):
        for results in original(call):
            if call.case == case:
                calls.append(call)
                if len(calls) == len(case.steps) + 1:
                    bits(results[0][0])[2, 0, 5] ^= 1
            yield results

    monkeypatch.setattr(soak_cases.Call, "results", results)
    status, printed = run()
    assert status == 1
    (line,) = [line for line in printed.splitlines() if line.startswith("FAIL: ")]
    assert line.startswith(f"FAIL: {case}, step 0, call 0, v_out: 1 of ") and "elements, first [2, 0, 5]: got " in line
    got, want = (int(part.partition(")")[0], 16) for part in line.split("(0x")[1:])
    assert got ^ want == 1


@pytest.mark.parametrize("tensor", ["w_uk", "w_uv_scale"])
def test_soak_finds_weights_that_an_update_forgot(run, monkeypatch, tensor):
    original, updates = soak_cases.Material.set_version, []

    def set_version(material, version):
        kept = getattr(material.weights, tensor).clone()
        original(material, version)
        updates.append(version)
        if len(updates) > 2 * COUNT:  # not in the first pass
            getattr(material.weights, tensor).copy_(kept)

    monkeypatch.setattr(soak_cases.Material, "set_version", set_version)
    status, printed = run()
    assert status == 1 and "FAIL: case " in printed, printed


def test_soak_finds_a_leak(run, monkeypatch):
    kept = []
    original = soak.run_group

    def leaking(*arguments):
        original(*arguments)
        kept.append(bytearray(b"\1" * (soak.GROWTH_BYTES["RSS"] // 2)))  # three groups a pass

    monkeypatch.setattr(soak, "run_group", leaking)
    status, printed = run()
    assert status == 1
    assert "FAIL: memory of RSS grew by " in printed and "at most 32.0 allowed" in printed


def test_soak_names_a_case_that_raises(run, monkeypatch):
    def fail(call):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    case = soak_cases.plan(0, COUNT, "cpu")[3]
    original = soak_cases.Call.run
    monkeypatch.setattr(soak_cases.Call, "run", lambda call: (fail if call.case == case else original)(call))
    status, printed = run()
    assert status == 1 and f"FAIL: {case}: raised RuntimeError: CUDA error: an illegal" in printed


def test_soak_state_carries_over(run, tmp_path, monkeypatch):
    state = tmp_path / "state.json"
    assert run("--state", state)[0] == 0
    first = json.loads(state.read_text())
    assert (first["passes"], first["runs"], first["cases"]) == (3, 1, 3 * COUNT)
    status, printed = run("--state", state)
    second = json.loads(state.read_text())
    assert status == 0 and "in 2 runs, 6 passes" in printed
    assert second["digests"] == first["digests"] and second["cases"] == 6 * COUNT
    changed = first["digests"][7][0]
    first["digests"][7][0] = f"{int(changed, 16) ^ 1:016x}"
    state.write_text(json.dumps(first))
    status, printed = run("--state", state)
    assert status == 1 and "FAIL: case 7: " in printed and f"has digest {changed}, not" in printed


@pytest.mark.parametrize(
    ("name", "value"),
    [("device", "a GPU of another kind"), ("library", "9.9.9 0123"), ("torch", "1.0"), ("seed", 4), ("count", 7)],
)
def test_soak_refuses_a_foreign_state(run, tmp_path, name, value):
    state = tmp_path / "state.json"
    assert run("--seed", 0, "--state", state)[0] == 0
    state.write_text(json.dumps(json.loads(state.read_text()) | {name: value}))
    before = state.read_bytes()
    status, printed = run("--seed", 0, "--state", state)
    said = "cases" if name == "count" else name
    assert status == 2 and printed.startswith(f"error: soak: --state must have {said} ")
    assert f"got {value!r} in {state}" in printed and state.read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"seed": 1}', "\x7fELF"])
def test_soak_refuses_a_file_that_is_no_state(run, tmp_path, content):
    state = tmp_path / "state.json"
    state.write_text(content)
    status, printed = run("--state", state)
    assert status == 2 and printed.startswith("error: soak: --state must be a file that a soak wrote, got ")
    assert state.read_text() == content


def test_soak_says_that_a_state_cannot_be_written(run, tmp_path):
    status, printed = run("--state", tmp_path / "none" / "state.json")
    assert status == 2 and printed.startswith("error: ") and "No such file or directory" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_soak_without_a_gpu_says_so(run):
    status, printed = run("--device", "cuda")
    assert status == 2 and printed.startswith("error: soak: --device must be cpu, got cuda: ")


def test_soak_plan_follows_its_seed():
    for device in ("cpu", "cuda"):
        one, same, other = (soak_cases.plan(seed, 50, device) for seed in (1, 1, 2))
        assert one == same and one != other
        assert {case.mode for case in one} == set(soak_cases.MODES[device])
        assert {soak_cases.CASE[case.name].op for case in one} == {c.op for c in soak_cases.CASE.values()}


def test_soak_digest_sees_every_bit_and_takes_any_nan(rng):
    material = soak_cases.Material(0, "cpu")
    for dtype in soak_cases.NAN_RULE:
        x = torch.randn(3, 5, 7, generator=rng).to(dtype)
        want = material.digest(x)
        assert material.digest(x.mT.contiguous().mT) == want, "strides do not count"
        for index in range(x.numel()):
            for bit in range(8 * x.element_size()):
                other = x.clone()
                bits(other).view(-1)[index] ^= torch.tensor(1 << bit).to(bits(x).dtype)
                assert material.digest(other) != want, f"{dtype}: element {index}, bit {bit}"
        magnitude, largest = soak_cases.NAN_RULE[dtype]
        nans = [x.clone() for _ in range(2)]
        bits(nans[0])[0, 0, 0], bits(nans[1])[0, 0, 0] = magnitude, largest + 1
        assert nans[0].float().isnan().sum() == nans[1].float().isnan().sum() == 1
        assert material.digest(nans[0]) == material.digest(nans[1]) != want


@pytest.mark.gpu
def test_soak_passes_on_the_gpu(capsys):
    assert soak.main(["--device", "cuda", "--minutes", "0", "--cases", "60"]) == 0, capsys.readouterr().out
