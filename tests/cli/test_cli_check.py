"""`python -m mla_fp8 check`: it passes here, and finds what is broken."""

import json
from types import SimpleNamespace

import pytest
import torch

from mla_fp8 import reference
from mla_fp8.__main__ import main
from mla_fp8.cli import compare, suite, tiles
from mla_fp8.cli.suite import VARIANTS, Maker, Setting

OPS = ["quantize_q_nope", "bmm", "absorb_q", "v_up", "v_up_quantized"]
ONE = Setting(65, torch.bfloat16, "normal", strided=True)


@pytest.fixture
def one_setting(monkeypatch):
    monkeypatch.setattr(suite, "SETTINGS", [ONE])


def run(capsys, *arguments: str) -> tuple[int, list[dict]]:
    code = main(["check", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_check_passes_on_the_cpu(capsys):
    code, results = run(capsys, "--device", "cpu")
    assert [result["op"] for result in results] == OPS
    assert [result["differences"] for result in results] == [[]] * len(OPS)
    assert [result["cases"] for result in results] == [
        len(suite.SETTINGS) * sum(variant.op == op for variant in VARIANTS) for op in OPS
    ]
    assert code == 0


@pytest.mark.gpu
def test_check_passes_on_the_gpu(capsys):
    code, results = run(capsys, "--device", "cuda:0")
    assert [result["differences"] for result in results] == [[]] * len(OPS)
    assert all(result["cases"] > len(suite.SETTINGS) for result in results), "tiles are checked too"
    assert code == 0


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant.op} {variant.name}".strip())
def test_check_allows_a_gpu_no_difference(variant):
    """The last bit of one element, turned over."""
    arguments = variant.make(Maker(ONE, 0, "cuda"))
    first, *others = (result.clone() for result in variant.call(arguments))
    assert not variant.compare(arguments, (first, *others), True)
    first.view(torch.uint8).view(-1)[300] ^= 1
    assert "elements" in variant.compare(arguments, (first, *others), True)


def test_check_prints_one_line_an_op(capsys, one_setting):
    assert main(["check", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] + line.split()[-1:] for line in lines[:5]] == [[op, "cpu", "PASS"] for op in OPS]
    assert lines[-1].startswith("PASS: 16 cases in ")
    assert max(map(len, lines)) <= 80


def off_at(function, index, change):
    """`function`, whose first result is changed at one index."""

    def broken(*arguments, **options):
        results = function(*arguments, **options)
        first = results[0] if isinstance(results, tuple) else results
        first[index] = change(first[index].float()).to(first.dtype)
        return results

    return broken


def test_check_shows_the_worst_element_of_a_broken_reference(capsys, monkeypatch, one_setting):
    monkeypatch.setattr(reference, "absorb_q", off_at(reference.absorb_q, (3, 1, 17), lambda x: x + 100))
    assert main(["check", "--device", "cpu"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "absorb_q cpu 8 cases" in printed
    assert "S = 65, bfloat16, normal, strided: 1 of 99,840 elements differ, the worst at [3, 1, 17]: got " in printed
    assert "FAIL: absorb_q on cpu, v_up on cpu" in printed


@pytest.mark.parametrize("op", OPS)
def test_check_finds_one_wrong_element(capsys, monkeypatch, one_setting, op):
    index = (1, 2, 3) if op != "v_up_quantized" else (1, 200)
    broken = off_at(getattr(reference, op), index, lambda x: x + torch.sign(x) * (x.abs() * 0.3 + 1))
    monkeypatch.setattr(reference, op, broken)
    code, results = run(capsys, "--device", "cpu")
    assert code == 1
    # The reference also makes bmm's input, and absorb_q's is v_up's too: others may differ with it.
    assert op in [result["op"] for result in results if result["differences"]]


def test_check_finds_a_wrong_scale(capsys, monkeypatch, one_setting):
    good = reference.v_up_quantized
    monkeypatch.setattr(reference, "v_up_quantized", lambda *x, **y: (good(*x, **y)[0], good(*x, **y)[1] * 1.01))
    code, results = run(capsys, "--device", "cpu")
    assert code == 1 and results[-1]["differences"][0].startswith(f"{ONE}: v_scale: 195 of 195 elements differ")


def faulty_ops(fault):
    """torch.ops.mla_fp8 with a v_up that has a fault."""
    real, calls = torch.ops.mla_fp8.v_up, iter(range(1000))

    def default(**given):
        if fault == "raises":
            raise RuntimeError("v_up: no kernel")
        v = real.default(**given)
        return v * 2 if fault == "second call" and next(calls) % 2 else v

    def out(v_out, **given):
        real.out(v_out=v_out, **given)
        if fault == "overload":
            v_out[0, 0, 0] += 1
        if fault == "beside":
            v_out.as_strided(v_out.shape[:1], v_out.stride()[:1], v_out.shape[-1])[0] = 7

    return SimpleNamespace(v_up=SimpleNamespace(default=default, out=out))


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("second call", "a second call gives other bits: "),
        ("overload", "with v_out=: 1 of 24,960 elements differ, the worst at [0, 0, 0]"),
        ("beside", "with v_out=: it wrote beside the view"),
    ],
)
def test_check_finds_faulty_calls(monkeypatch, fault, text):
    monkeypatch.setattr(
        suite, "torch", SimpleNamespace(**vars(torch) | {"ops": SimpleNamespace(mla_fp8=faulty_ops(fault))})
    )
    variant = next(variant for variant in VARIANTS if variant.op == "v_up")
    found = list(variant.differences(Maker(ONE, 0, "cpu")))
    assert len(found) == 1 and found[0].startswith(text)


def test_check_reports_an_op_that_raises(capsys, monkeypatch, one_setting):
    monkeypatch.setattr(suite, "VARIANTS", [variant for variant in VARIANTS if variant.op == "v_up"])
    monkeypatch.setattr(
        suite, "torch", SimpleNamespace(**vars(torch) | {"ops": SimpleNamespace(mla_fp8=faulty_ops("raises"))})
    )
    code, (result,) = run(capsys, "--device", "cpu")
    assert code == 1 and result["differences"][0] == f"{ONE}: raised RuntimeError: v_up: no kernel"


def test_check_without_a_device_does_not_pass(capsys):
    code, results = run(capsys, "--device", "cuda:77")
    assert code == 1
    assert [result["cases"] for result in results] == [0] * 5
    assert all(result["skipped"] for result in results)


@pytest.mark.parametrize("device", ["meta", "abacus", "cuda:x", ""])
def test_check_refuses_what_is_no_device(capsys, device):
    assert main(["check", "--device", "cpu", "--device", device]) == 2
    assert capsys.readouterr() == (
        "",
        f"error: check: --device must be cpu, cuda or cuda:0, cuda:1, ..., got {device}\n",
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant.op} {variant.name}".strip())
def test_check_takes_every_tile_that_fits(variant):
    """On the CPU a forced tile changes nothing, but the problem and its tiles are the GPU's."""
    titles = [title for title, wrong in tiles.each_tile(variant, 0, "cpu") if not wrong]
    assert len(titles) == len(set(titles)) > len(tiles.ROWS)
    for s in tiles.ROWS:
        assert any(title.endswith(f", S = {s}") for title in titles)


NORMAL = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
SMALL = torch.tensor(1e-6)


def test_same_bits_tells_zeros_of_either_sign_apart():
    zeros, nan = torch.tensor([0.0, -0.0, 0.0]), torch.tensor([float("nan"), -0.0])
    assert compare.same_bits(zeros, -zeros) == "3 of 3 elements are zeros of the other sign"
    assert not compare.same_bits(zeros, zeros)
    assert not compare.same_bits(nan, torch.tensor([-float("nan"), -0.0]))


def test_within_allows_neighbours_and_no_more():
    want = torch.tensor([1.0, -3.0, 0.0]).bfloat16()
    neighbours = torch.tensor([1.0 + 2**-7, -3.0 - 2**-6, 0.0]).bfloat16()
    assert compare.within(neighbours, want, SMALL) == ""
    wrong = compare.within(torch.tensor([1.0, -3.0 - 2**-5, 0.0]).bfloat16(), want, SMALL)
    assert wrong == "1 of 3 elements differ, the worst at [1]: got -3.03125, want -3"
    assert compare.within(torch.tensor([1.0, -3.0, 0.1]).bfloat16(), want, SMALL) != ""
    assert compare.within(neighbours, want, torch.tensor(0.0)).startswith("2 of 3 elements differ")


def test_within_finds_rounding_toward_zero():
    bits = NORMAL.view(torch.int32) & ~0xFFFF
    truncated = bits.view(torch.float32).bfloat16()
    assert compare.within(NORMAL.bfloat16(), NORMAL.bfloat16(), SMALL) == ""
    assert compare.within(truncated, NORMAL.bfloat16(), SMALL).startswith("relative error 4")
    assert compare.within(truncated, NORMAL.bfloat16(), SMALL, typical=False) == ""


def test_within_finds_e4m3_that_was_rounded_twice():
    want = NORMAL.to(torch.float8_e4m3fn)
    twice = NORMAL.bfloat16().to(torch.float8_e4m3fn)
    assert compare.within(twice, want, SMALL).startswith("relative error ")


@pytest.mark.parametrize(("got", "want"), [(1.0, "nan"), ("nan", 1.0), ("inf", 1.0), ("inf", "-inf"), (1.0, "inf")])
def test_within_takes_nothing_for_what_is_not_finite(got, want):
    got, want = (torch.tensor([float(value)]).bfloat16() for value in (got, want))
    assert compare.within(got, want, torch.tensor(1e6)).startswith("1 of 1 elements differ, the worst at [0]")
    assert compare.within(want, want, SMALL) == ""


def test_within_compares_shape_and_dtype_first():
    assert compare.within(NORMAL[:2], NORMAL, SMALL) == "got torch.float32 [2, 100], want torch.float32 [200, 100]"
    assert "got torch.float16" in compare.within(NORMAL.half(), NORMAL, SMALL)
