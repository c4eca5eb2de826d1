"""The bits of a (token, head) depend on that token and head alone."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import helpers
import pytest
import torch
from cases import CASES, each_case

S, H = 130, 6

# Which dim of each argument and result counts tokens or heads; None where it has no such dim.
TOKENS = {"q_nope": 0, "q_pe": 0, "o_latent": 0, "a": 1, "a_scale": 1}
HEADS = {"q_nope": 1, "q_pe": 1, "o_latent": 1, "a": 0, "a_scale": 0, "w_uk": 0, "w_uk_scale": 0, "w_uv": 0,
         "w_uv_scale": 0, "b": 0, "b_scale": 0}  # fmt: skip
HEAD_MAJOR = {"quantize_q_nope", "bmm"}


def select(arguments, dims, index):
    picked = {
        name: value.index_select(dims[name], index) if name in dims else value for name, value in arguments.items()
    }
    if "m" in picked and dims is TOKENS:
        picked["m"] = len(index)
    return picked


def by_token_and_head(case, results, s, h):
    """Each result as [S, H, ...], without padding rows."""
    if case.op == "v_up_quantized":
        return [results[0].view(s, h, -1), results[1].unsqueeze(-1)]
    if case.op in HEAD_MAJOR:
        return [result[:, :s].transpose(0, 1) for result in results]
    return list(results)


def run(case, arguments, s, h):
    return by_token_and_head(case, case.call(arguments), s, h)


@pytest.mark.parametrize("tokens", [[0], [129], [64, 3], list(range(17)), list(range(1, 66)), list(range(129, -1, -1))],
                         ids=lambda tokens: f"{len(tokens)}_from_{tokens[0]}")  # fmt: skip
@each_case
def test_op_bits_do_not_depend_on_the_other_tokens(rng, device, dtype, case, tokens):
    arguments = case.arguments(rng, S, H, dtype, device)
    index = torch.tensor(tokens, device=device)
    alone = run(case, select(arguments, TOKENS, index), len(tokens), H)
    for got, batch in zip(alone, run(case, arguments, S, H), strict=True):
        helpers.assert_same_bits(got.contiguous(), batch[index].contiguous())


@pytest.mark.parametrize("heads", [[0], [5], [4, 1], [0, 1, 2]], ids=lambda heads: f"{len(heads)}_from_{heads[0]}")
@each_case
def test_op_bits_do_not_depend_on_the_other_heads(rng, device, dtype, case, heads):
    arguments = case.arguments(rng, 33, H, dtype, device)
    index = torch.tensor(heads, device=device)
    alone = run(case, select(arguments, HEADS, index), 33, len(heads))
    for got, batch in zip(alone, run(case, arguments, 33, H), strict=True):
        helpers.assert_same_bits(got.contiguous(), batch[:, index].contiguous())


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("s,h", [(1, 16), (33, 1), (130, 3)])
@each_case
def test_op_bits_do_not_depend_on_the_number_of_threads(rng, case, s, h):
    arguments = case.arguments(rng, s, h)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(case.call(arguments))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            helpers.assert_same_bits(got, want)


@each_case
def test_op_is_deterministic(rng, device, dtype, case):
    arguments = case.arguments(rng, 130, 3, dtype, device)
    first = case.call(arguments)
    for _ in range(4):
        for got, want in zip(case.call(arguments), first, strict=True):
            helpers.assert_same_bits(got, want)


@each_case
def test_op_bits_do_not_depend_on_calls_from_other_threads(rng, device, case):
    calls = [case.arguments(rng, s, 3, device=device) for s in (1, 7, 65, 130)]
    want = [case.call(arguments) for arguments in calls]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(case.call, calls * 8))
    for i, results in enumerate(got):
        for result, expected in zip(results, want[i % len(calls)], strict=True):
            helpers.assert_same_bits(result, expected)


@pytest.mark.parametrize("position", [0, 1, 63, 64, 129])
@pytest.mark.parametrize("case", [case for case in CASES if case.op in ("absorb_q", "v_up")], ids=str)
def test_op_bits_do_not_depend_on_the_position(rng, device, case, position):
    """The same row at another place gives the same bits there."""
    arguments = case.arguments(rng, S, 2, torch.bfloat16, device)
    row = {name: value.select(TOKENS[name], 7) for name, value in arguments.items() if name in TOKENS}
    (want,) = run(case, arguments, S, 2)
    for name, value in row.items():
        arguments[name] = arguments[name].clone()
        arguments[name].select(TOKENS[name], position).copy_(value)
    (got,) = run(case, arguments, S, 2)
    helpers.assert_same_bits(got[position], want[7])
