"""The ops on DTensors give every rank its part of the whole result's bits, and send nothing."""

import os
import re
import sys
from pathlib import Path

import processes
import pytest
import sharded
import torch
from cases import CASES, each_case
from ranks import LOOPBACK, Ranks

EXAMPLES = Path(__file__).parents[2] / "examples"

RANKS = 2
# Of mla_decode_tp.py: each rank's part is rounded to bf16 (1.7e-3 of the norm), each addition is, the whole layer is; 8
# ranks make that 1.7e-3 * sqrt(9), and twice that leaves room for last bits of q.
MOST_ERROR = 1e-2
SPLIT_BY_TOKEN = [case for case in CASES if case.op in ("absorb_q", "v_up", "v_up_quantized")]
pytestmark = pytest.mark.xdist_group("distributed")  # one set of ranks, not one in every worker
by_token = pytest.mark.parametrize("case", SPLIT_BY_TOKEN, ids=str)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Device and number -> that many ranks, started once, and again after a test that broke them."""
    groups = {}

    def start(device, size=RANKS):
        if (device, size) not in groups or not groups[device, size].running:
            groups[device, size] = Ranks(device, size, tmp_path_factory.mktemp("ranks"))
        return groups[device, size]

    yield start
    for group in groups.values():
        group.stop()


@pytest.fixture
def ranks(device, started):
    return started(device)


@pytest.fixture
def seed(rng):
    return int(torch.randint(2**31, (), generator=rng))


@pytest.mark.parametrize("heads", [2, 4])
@each_case
def test_op_sharded_by_head_gives_the_eager_bits(ranks, seed, case, heads):
    ranks.run(sharded.check_by_head, str(case), seed, heads)


@pytest.mark.parametrize("case", [case for case in CASES if case.op != "v_up_quantized"], ids=str)
def test_op_sharded_by_head_takes_unequal_parts(ranks, seed, case):
    ranks.run(sharded.check_by_head, str(case), seed, 3)


@by_token
def test_op_sharded_by_token_gives_the_eager_bits(ranks, seed, case):
    ranks.run(sharded.check_by_token, str(case), seed)


@by_token
def test_op_sharded_by_head_and_token_gives_the_eager_bits(device, started, seed, case):
    started(device, 4).run(sharded.check_by_head_and_token, str(case), seed)


@each_case
def test_op_replicated_gives_the_eager_bits(ranks, seed, case):
    ranks.run(sharded.check_replicated, str(case), seed)


@each_case
def test_op_sharded_and_compiled_gives_the_eager_bits(ranks, seed, case):
    ranks.run(sharded.check_compiled, str(case), seed, 4)


def test_layer_sharded_by_head_sends_one_all_reduce(ranks, seed):
    ranks.run(sharded.check_layer, seed)


def test_v_up_quantized_sharded_rejects_a_head_cut_in_two(ranks):
    want = "v_up_quantized: o_latent must have a multiple of 2 heads, as 2 ranks share them, got [7, 3, 512]"
    for error in ranks.run(sharded.check_rejects, "v_up_quantized", 3, "default"):
        assert want in error


def test_op_out_sharded_says_that_it_has_no_strategy(ranks):
    for error in ranks.run(sharded.check_rejects, "absorb_q", 2, "out"):
        assert "absorb_q.out" in error and "sharding strategy" in error


def test_register_shardings_example_runs(ranks):
    ranks.run(sharded.check_example_of_docstring, "register_shardings")


def test_ranks_report_the_one_that_ends(ranks):
    with pytest.raises(pytest.fail.Exception, match="rank 1 ended in end with exit code 3"):
        ranks.run(sharded.end, 1)


def test_example_mla_decode_tp_equals_one_rank(device):
    """On 1, 2, 4 or 8 GPUs, or two processes on the CPU; each rank prints how far it is from the whole layer."""
    count = 1 << torch.cuda.device_count().bit_length() - 1 if device == "cuda" else RANKS  # must divide 16 heads
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | LOOPBACK
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    script = EXAMPLES / "mla_decode_tp.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    result = processes.run([*torchrun, f"--nproc-per-node={count}", script, "--steps", "4"], env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    steps = re.findall(r"rank (\d) of (\d) on (\w+)\S*: (\d+) heads, [\d.]+ µs a step, error (\S+),", result.stdout)
    assert sorted(step[:4] for step in steps) == [
        (str(rank), str(count), device, str(16 // count)) for rank in range(count)
    ]
    assert all(0 <= float(error) < MOST_ERROR for *_, error in steps)
