"""benchmarks/engines without an engine: the checkpoint, the fp32 oracle, forced decoding, timelines, verdicts."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.bench.report import write_json
from benchmarks.engines import checkpoint, compare, decoding, forced, oracle, timeline
from benchmarks.engines.checkpoint import Shape
from benchmarks.engines.texts import Size, Text, texts
from benchmarks.engines.timeline import Kernel

TINY = Shape(2, 2, 128, 128, 128, 128, 64, 128, vocab_size=64)
# Both sides are fp32 with sums of at most 512 products in another order, over two layers: some tens of 2^-24, at logits
# of at most 10.
ORACLE_NATS = 1e-4
E4M3_STEP = 2.0**-4  # of a value: half of the distance between neighbours of 3 fraction bits
GEMM, FLASH = "void cutlass_3x_gemm_fp8_blockwise<...>", "flash::FlashAttnFwdSm90<...>"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("engines") / "model"
    checkpoint.write(path, TINY)
    return path


def test_checkpoint_has_a_scale_a_block_and_every_tensor(directory):
    stored = load_file(directory / checkpoint.FILE)
    for layer in range(TINY.num_hidden_layers):
        for name, (rows, columns) in TINY.linears().items():
            weight = stored[f"model.layers.{layer}.{name}.weight"]
            scale = stored[f"model.layers.{layer}.{name}.weight_scale_inv"]
            assert weight.shape == (rows, columns) and weight.dtype == torch.float8_e4m3fn
            assert scale.shape == (-(-rows // 128), -(-columns // 128)) and scale.dtype == torch.float32
    assert len(stored) == 3 + TINY.num_hidden_layers * (len(TINY.norms()) + 2 * len(TINY.linears()))
    config = json.loads((directory / "config.json").read_text())
    assert config["first_k_dense_replace"] == config["num_hidden_layers"] == 2


def test_quantize_keeps_a_weight_whose_last_block_is_cut():
    weight = torch.randn(192, 128)
    val, scale = checkpoint.quantize(weight)
    error = (val.float() * checkpoint.expand(scale, 192, 128) - weight).abs()
    assert (error <= weight.abs() * E4M3_STEP + scale.max() * 2**-9).all()


def test_oracle_matches_transformers(directory):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    given = {key: value for key, value in TINY.config().items() if key not in ("quantization_config", "torch_dtype")}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**given)).float().eval()
    ours = oracle.Oracle(directory, torch.device("cpu"))
    missing = model.load_state_dict(ours.weights, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys, missing
    tokens = torch.randint(2, TINY.vocab_size, (2, 40))
    with torch.no_grad():
        want = model(tokens).logits.log_softmax(-1)
    difference = (ours.log_probs(tokens) - want).abs().max()
    assert difference <= ORACLE_NATS, difference


def test_oracle_rows_are_of_the_positions_that_decode(directory):
    ours = oracle.Oracle(directory, torch.device("cpu"))
    given = texts(Size(sequences=3, prompt_tokens=12, forced_tokens=5), TINY.vocab_size)
    rows = ours.rows(given)
    assert [row["sequence"] for row in rows] == [0, 1, 2]
    text, row = given[1], rows[1]
    alone = ours.log_probs(torch.tensor([text.prompt + text.continuation]))[0]
    want = [float(alone[len(text.prompt) + step, text.continuation[step + 1]]) for step in range(4)]
    assert row["forced_logprob"] == pytest.approx(want, abs=ORACLE_NATS)
    assert row["best_logprob"] == pytest.approx([float(alone[len(text.prompt) + s].max()) for s in range(4)], abs=1e-4)


def test_oracle_rejects_a_model_with_experts(directory, tmp_path):
    config = json.loads((directory / "config.json").read_text()) | {"first_k_dense_replace": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="dense layers only"):
        oracle.Oracle(tmp_path, torch.device("cpu"))


def test_texts_are_the_same_in_every_run_and_enough():
    assert texts(Size(), 1024) == texts(Size(), 1024)
    assert Size().positions >= compare.LEAST_POSITIONS
    assert sum(len(text.prompt) for text in texts(Size(), 1024)) <= 8192  # one prefill step, then all decode


def added(row, tokens, written):
    return (row, SimpleNamespace(extra_args={forced.ARGUMENT: tokens} if tokens else None), [], written)


def update(removed=(), added=(), moved=()):
    return SimpleNamespace(removed=removed, added=added, moved=moved)


def test_forced_writes_the_token_of_each_step_and_leaves_other_requests():
    processor, written = forced.Forced(), []
    processor.update_state(update(added=[added(0, [5, 6, 7], written), added(1, None, [])]))
    for step, want in enumerate([5, 6, 7]):
        logits = torch.randn(2, 9)
        other = logits[1].clone()
        assert processor.apply(logits)[0].argmax() == want
        assert torch.equal(logits[1], other)
        written.append(-1 if step else want)  # an engine that schedules ahead knows a token later than its place
        processor.update_state(None)


def test_forced_follows_its_requests_through_the_batch():
    processor = forced.Forced()
    processor.update_state(update(added=[added(row, [row + 3], []) for row in range(3)]))
    swap, move = SimpleNamespace(name="SWAP"), SimpleNamespace(name="UNIDIRECTIONAL")
    processor.update_state(update(removed=[1], moved=[(0, 2, swap), (2, 1, move)]))
    assert {row: state.token for row, state in processor.states.items()} == {0: 5, 1: 3}
    processor.update_state(update(added=[added(0, None, [])]))
    assert set(processor.states) == {1}


def test_forced_row_leaves_out_the_prefill_and_rejects_other_tokens():
    def said(**logprobs):
        return {int(name[1:]): SimpleNamespace(logprob=value) for name, value in logprobs.items()}

    text = Text([1, 2], [4, 5])
    output = SimpleNamespace(token_ids=[4, 5], logprobs=[said(t4=-1.0), said(t7=-0.5, t3=-1.5, t5=-9.0)])
    assert forced.row(6, text, output) == {
        "measure": "forced",
        "sequence": 6,
        "best": [7],
        "best_logprob": [-0.5],
        "second_logprob": [-1.5],
        "forced_logprob": [-9.0],
    }
    with pytest.raises(ValueError, match="tokens must be"):
        forced.row(6, text, SimpleNamespace(token_ids=[4, 6], logprobs=[{}, {}]))


class FakeEngine:
    """One prefill a step, then every sequence a token a step."""

    def __init__(self, ends_after=10**6):
        self.output_processor = SimpleNamespace(request_states={})
        self.model_config = SimpleNamespace(max_model_len=64)
        self.ends_after, self.ready = ends_after, 0

    def add_request(self, name, prompt, params):
        state = SimpleNamespace(tokens=0)
        state.detokenizer = SimpleNamespace(num_output_tokens=lambda: state.tokens)
        self.output_processor.request_states[name] = state

    def step(self):
        states = self.output_processor.request_states
        self.ready += 1
        for state in list(states.values())[: self.ready]:
            state.tokens += 1
        for name in [name for name, state in states.items() if state.tokens >= self.ends_after]:
            del states[name]

    def abort_request(self, names):
        for name in names:
            self.output_processor.request_states.pop(name, None)


def test_decoding_begins_when_every_sequence_decodes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    engine = FakeEngine()
    with decoding.decoding(SimpleNamespace(llm_engine=engine), lambda **given: None, 3, 8, 64) as running:
        assert [state.tokens for state in engine.output_processor.request_states.values()] == [4, 3, 2]
        assert running.steps(5) > 0 and running.written() == 7
    assert not engine.output_processor.request_states


def test_decoding_rejects_a_sequence_that_ends(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    llm = SimpleNamespace(llm_engine=FakeEngine(ends_after=6))
    with (
        pytest.raises(RuntimeError, match="3 sequences must decode, got 2"),
        decoding.decoding(llm, lambda **given: None, 3, 8, 64) as running,
    ):
        running.steps(2)


def step_of(gaps, start=0.0):
    """Kernels of a layer: q_a_proj, norm, q_b_proj, what stands before o_proj with `gaps` between, o_proj, MLP."""
    names = [GEMM, "norm", GEMM, "rope", "nvjet bmm", FLASH, "flash::FlashAttnFwdCombine", "quant", GEMM, "norm", GEMM]
    kernels = []
    for name, gap in zip(names, gaps, strict=True):
        kernels.append(Kernel(start + gap, start + gap + 2.0, name))
        start = kernels[-1].end_us
    return kernels


def test_windows_are_from_the_gemm_before_attention_to_the_one_after():
    whole = step_of([1.0] * 11) + step_of([1.0] * 8 + [4.0] + [1.0] * 2, start=100.0)
    found = timeline.windows(reversed(whole))
    assert [window.us for window in found] == [pytest.approx(16.0), pytest.approx(19.0)]
    assert [kernel.name for kernel in found[0].kernels] == [kernel.name for kernel in whole[3:8]]
    assert found[1].kernels[0].start_us == pytest.approx(1.0)
    assert timeline.summary(found)["windows"] == 2 and timeline.summary(found)["us"] == pytest.approx(17.5)


def test_windows_leave_out_what_the_record_cut():
    layer = step_of([1.0] * 11)
    assert len(timeline.windows(layer[3:] + step_of([1.0] * 11, start=100.0)[:6])) == 0
    with pytest.raises(ValueError, match="no attention"):
        timeline.summary([])


def test_windows_see_a_kernel_that_begins_before_the_one_ahead_ends():
    kernels = [Kernel(0, 5, GEMM), Kernel(6, 20, FLASH), Kernel(18, 22, "v_up"), Kernel(23, 30, GEMM)]
    assert timeline.windows(kernels)[0].us == 18


def forced_rows(label, batch, shift=0.0, best=None, lead=1.0, count=50):
    """count texts of 50 positions; `shift` moves the given token's log-probability up and down by turns."""
    rows = []
    for sequence in range(count):
        moved = [-5.0 + shift * (1 if (sequence + step) % 2 else -0.5) for step in range(50)]
        row = {"measure": "forced", "label": label, "batch": batch, "sequence": sequence, "best": [best or 3] * 50}
        row |= {"best_logprob": [-1.0] * 50, "second_logprob": [-1.0 - lead] * 50, "forced_logprob": moved}
        rows.append(row)
    return rows


STOCK = forced_rows("stock", 8) + forced_rows("stock", 64, shift=0.02)


def words(verdicts):
    return [verdict.word for verdict in verdicts]


def test_accuracy_is_kept_by_a_plugin_as_near_as_stock():
    rows = STOCK + forced_rows("plugin", 64, shift=0.02) + forced_rows("oracle", None)
    verdicts = compare.accuracy(rows)
    assert verdicts[0].found == "0.0200" and words(verdicts) == [compare.KEPT] * 3


def test_accuracy_is_not_kept_by_another_best_token_or_by_distance():
    other = STOCK + forced_rows("plugin", 64, best=4) + forced_rows("oracle", None)
    assert words(compare.accuracy(other))[1:] == [compare.BROKEN, compare.KEPT]
    close = [row | {"second_logprob": [-1.04] * 50} for row in STOCK]
    assert words(compare.accuracy(close + other[len(STOCK) :]))[1] == compare.KEPT  # below the margin
    far = STOCK + forced_rows("plugin", 64, shift=0.03) + forced_rows("oracle", None)
    assert words(compare.accuracy(far))[1:] == [compare.KEPT, compare.BROKEN]


def test_accuracy_needs_two_batches_and_enough_positions():
    one = forced_rows("stock", 64) + forced_rows("plugin", 64) + forced_rows("oracle", None)
    assert words(compare.accuracy(one))[:2] == [compare.MISSING] * 2
    few = [row for row in STOCK if row["sequence"] < 10] + forced_rows("plugin", 64)
    assert words(compare.accuracy(few))[1:] == [compare.BROKEN, compare.MISSING]


def measured(label, us, ms, loaded_bytes, **counts):
    facts = {"label": label, "heads": 128, "layers": 4}
    rows = [
        {"measure": "timeline", "batch": 1, "context": 1000, "us": us},
        {"measure": "step", "batch": 1, "context": 256, "ms": ms, "ms_min": ms, "ms_max": ms},
        {"measure": "memory", "loaded_bytes": loaded_bytes, "cache_blocks": 10},
        {"measure": "greedy", "prompt": 0, "tokens": [1, 2, 3 if label == "stock" else 4]},
    ]
    if counts:
        rows.append({"measure": "counts", **counts})
    return [row | facts for row in rows]


@pytest.mark.parametrize(
    "us, ms, saved, seconds, status", [(40.9, 2.2, 17e6, 0.1, 0), (41.5, 2.2, 17e6, 0.1, 1), (40.9, 2.6, 17e6, 0.1, 1),
                                       (40.9, 2.2, 1e6, 0.1, 1), (40.9, 2.2, 17e6, 0.2, 1), (40.9, 2.2, 17e6, None, 4)]
)  # fmt: skip
def test_compare_says_which_bar_is_not_kept(us, ms, saved, seconds, status, tmp_path, monkeypatch, capsys):
    facts = {"heads": 128, "layers": 4}
    stock = measured("stock", 46.0, 2.5, int(5e8)) + [row | facts for row in STOCK]
    plugin = measured("plugin", us, ms, int(5e8 - 4 * saved), products=8, dequantizations=0, load_seconds=seconds)
    plugin += [row | facts for row in forced_rows("plugin", 64, shift=0.02)]
    files = [str(tmp_path / f"{name}.json") for name in ("stock", "plugin", "oracle")]
    for file, rows in zip(files, (stock, plugin, forced_rows("oracle", None)), strict=True):
        write_json(tmp_path / file, rows, facts)
    monkeypatch.setattr(sys, "argv", ["compare", *files])
    assert compare.main() == status
    assert (compare.BROKEN in capsys.readouterr().out) == (status == 1)


def test_compare_names_what_was_not_measured():
    rows = [row for row in measured("stock", 46.0, 2.5, 10) if row["measure"] != "memory"]
    rows += [{"measure": "timeline", "label": "plugin", "status": "failed", "reason": "no"}]
    said = {verdict.bar: verdict.found for verdict in compare.unmeasured(rows, "timeline", "memory", "counts")}
    assert said == {"timeline": "needs plugin", "memory": "needs stock and plugin", "counts": "needs plugin"}


def fake_llm():
    """An engine with one head, as far as `attached` looks."""
    head = torch.nn.Identity()
    head.head_dtype = torch.bfloat16
    batch = SimpleNamespace(
        logitsprocs=SimpleNamespace(non_argmax_invariant=[]), logitsprocs_need_output_token_ids=False
    )
    runner = SimpleNamespace(get_model=lambda: torch.nn.Sequential(head), input_batch=batch)
    worker = SimpleNamespace(model_runner=runner)
    return SimpleNamespace(collective_rpc=lambda call: [call(worker)]), head, batch


def test_attached_leaves_the_engine_as_it_was():
    llm, head, batch = fake_llm()
    with pytest.raises(KeyError), forced.attached(llm, torch.float32):
        assert head.head_dtype == torch.float32 and batch.logitsprocs_need_output_token_ids
        assert isinstance(batch.logitsprocs.non_argmax_invariant[0], forced.Forced)
        raise KeyError
    assert head.head_dtype == torch.bfloat16 and not batch.logitsprocs_need_output_token_ids
    assert batch.logitsprocs.non_argmax_invariant == []


def test_attached_rejects_an_engine_without_a_dtype_of_logits():
    llm, head, batch = fake_llm()
    del head.head_dtype
    with pytest.raises(ValueError, match="--logits model"), forced.attached(llm, torch.float32):
        pass
    assert batch.logitsprocs.non_argmax_invariant == []
    with forced.attached(llm, None):
        assert batch.logitsprocs_need_output_token_ids
