"""The SGLang plugin's masked_m, which saves a launch by being a row of a table: values, captures, torch.compile."""

import fake_sglang as fake
import pytest
import torch
from helpers import assert_same_bits, randn

from mla_fp8.integrations import sglang as plugin

LIMIT = plugin.TABLE_ROWS
CUDA = pytest.mark.gpu


@pytest.fixture(autouse=True)
def no_tables(monkeypatch):
    monkeypatch.setattr(plugin, "tables", {})


def run(x):
    """The plugin's five results; SGLang's own function is never reached."""
    return plugin.around(pytest.fail, x)


def activations(rng, rows, heads=3, k=128, device="cuda"):
    return randn(rng, heads, rows, k, dtype=torch.bfloat16, device=device)


def assert_five(got, x):
    want, rows = fake.masked_quantization(x), x.shape[1]
    assert_same_bits(got[1][:, :rows], want[1][:, :rows], "x_scale")
    assert_same_bits(got[2], want[2], "masked_m")
    assert got[3:] == want[3:]


def test_sglang_table_holds_every_count(device):
    with torch.inference_mode():  # as SGLang calls; what is kept must serve outside of it, too
        table = plugin.row_counts(torch.device(device), 3)
    assert len(table) == LIMIT + 1
    for rows, counts in enumerate(table):
        assert counts.shape == (3,) and counts.dtype == torch.int32 and counts.is_contiguous()
        assert counts.device.type == device and not counts.is_inference()
        assert rows % 128 or counts.tolist() == [rows] * 3
    assert_same_bits(torch.stack(table).cpu(), torch.arange(LIMIT + 1, dtype=torch.int32)[:, None].repeat(1, 3))


def test_sglang_cpu_calls_make_no_table(rng):
    x = activations(rng, 2, device="cpu")
    assert_five(run(x), x)
    assert plugin.tables == {}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_sglang_compiles_without_a_break(rng, backend):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: plugin.around(fake.masked_quantization, x), fullgraph=True, backend=backend)
    for rows in (2, 5, 300):
        x = activations(rng, rows, device="cpu")
        got, want = compiled(x), run(x)
        assert_same_bits(got[0][:, :rows], want[0][:, :rows], "x_val")
        assert_five(got, x)


@CUDA
@pytest.mark.parametrize("rows", [1, LIMIT, LIMIT + 1])
def test_sglang_masked_m_is_the_tables_up_to_its_end(rng, rows):
    x = activations(rng, rows)
    with torch.inference_mode():
        first, second = run(x), run(x)
    assert_five(first, x)
    assert (first[2].data_ptr() == second[2].data_ptr()) is (rows <= LIMIT)


@CUDA
@pytest.mark.parametrize("warmed_up", [True, False])
def test_sglang_graph_capture(rng, warmed_up):
    x, graph = activations(rng, 7), torch.cuda.CUDAGraph()
    torch.ops.mla_fp8.quantize_q_nope(x.transpose(0, 1))  # loads the kernel, makes no table
    if warmed_up:
        run(x)
    with torch.cuda.graph(graph):
        got = run(x)
    assert bool(plugin.tables) is warmed_up
    if not warmed_up:
        assert_five(run(x), x)  # the table of this call must not be the graph's memory
    for _ in range(2):
        x.copy_(activations(rng, 7))
        graph.replay()
        assert_five(got, x)


@CUDA
def test_sglang_table_serves_other_streams(rng):
    x = activations(rng, 7)
    run(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        masked_m = run(x)[2]
        assert masked_m.tolist() == [7, 7, 7]
