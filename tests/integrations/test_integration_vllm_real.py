"""The vLLM plugin in a whole vLLM, where one is installed: a random checkpoint, stock and plugin, each in a process."""

import importlib.util
import json
import os
import sys

import processes
import pytest
import torch

from benchmarks.engines import checkpoint

LAYERS, TOKENS = 2, 12
SECONDS = 300  # an import of vLLM from a cold disk is half a minute
SURE = 3  # tokens: a random model's margins are small, and the products are rounded at other places
CLOSE = 0.1  # nats of the sum of their log-probabilities

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

RUN = """
import json, sys
import safetensors.torch
from vllm import LLM, SamplingParams

llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True, detokenize=False)
prompts = [{"prompt_token_ids": list(range(5, 25))}, {"prompt_token_ids": [7, 8, 9]}]

def generate():
    made = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False)]
    return [(list(each.token_ids), each.cumulative_logprob) for each in made]

def look(model):
    layers = [module for module in model.modules() if hasattr(module, "W_UK_T")]
    weights = [getattr(layer, name) for layer in layers for name in ("W_UK_T", "W_UV")]
    return [(type(w).__name__, id(w), w.weight.data_ptr() if hasattr(w, "scale") else 0) for w in weights]

def used():
    if "mla_fp8" not in sys.modules:
        return None
    from mla_fp8.weights.block_fp8_weight import counts
    return counts()

result = {"tokens": generate(), "weights": llm.apply_model(look)[0], "counts": used()}
options = {}
if sys.argv[3:]:
    options["weights_iterator"] = list(safetensors.torch.load_file(sys.argv[3]).items())
llm.collective_rpc("reload_weights", kwargs=options)
result |= {"tokens again": generate(), "weights again": llm.apply_model(look)[0], "counts again": used()}
print("RESULT" + json.dumps(result))
"""

OPTIONS = {
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "dtype": "bfloat16",
    "seed": 0,
    "enable_prefix_caching": False,
    "max_num_seqs": 8,
    "enforce_eager": True,
}
ON_CPU = {"attention_backend": "CPU_MLA", "compilation_config": {"custom_ops": ["none"]}}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model takes a function
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
}


def run(directory, model, switch, *checkpoint_file, **options):
    """The printed result, and the plugin's lines; weights are reloaded as they were loaded, or from this file."""
    options = OPTIONS | ({} if torch.cuda.is_available() else ON_CPU) | options
    script = directory / "run.py"
    script.write_text(RUN)
    command = [sys.executable, script, model, json.dumps(options), *checkpoint_file]
    done = processes.run(command, SECONDS, cwd=directory, env=os.environ | ENVIRONMENT | {"MLA_FP8_VLLM": switch})
    assert done.returncode == 0, done.stderr[-4000:]
    (result,) = [line.removeprefix("RESULT") for line in done.stdout.splitlines() if line.startswith("RESULT")]
    said = [line[line.index("mla_fp8:") :] for line in (done.stdout + done.stderr).splitlines() if "mla_fp8:" in line]
    return json.loads(result), said


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    checkpoint.write(directory, checkpoint.Shape(LAYERS, num_attention_heads=4, hidden_size=512))
    return directory


@pytest.fixture(scope="module")
def stock(model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("stock"), model, "0")


@pytest.fixture(scope="module")
def ours(model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("plugin"), model, "1")


def test_vllm_real_is_off_unless_asked_for(stock):
    result, said = stock
    assert {kind for kind, *_ in result["weights"]} == {"Parameter"} and said == []
    assert result["counts"] in (None, [0, 0])


def test_vllm_real_runs_both_products(stock, ours):
    result, (line,) = ours
    assert [kind for kind, *_ in result["weights"]] == ["BlockFp8Weight"] * 2 * LAYERS
    assert line.startswith(f"mla_fp8: {LAYERS} of {LAYERS} MLA layers run W_UK_T and W_UV from FP8, ")
    products, dequantizations = result["counts"]
    assert products >= 2 * LAYERS * (TOKENS - 1) or torch.cuda.is_available()  # there a graph's run is not counted
    assert products > 0 and dequantizations == 0
    for (got_tokens, got), (want_tokens, want) in zip(result["tokens"], stock[0]["tokens"], strict=True):
        assert got_tokens[:SURE] == want_tokens[:SURE]
        assert got_tokens != want_tokens or abs(got - want) <= CLOSE


def test_vllm_real_reload_keeps_objects_and_addresses(ours):
    result, _ = ours
    assert result["weights again"] == result["weights"]
    assert result["tokens again"] == result["tokens"] and result["counts again"][1] == 0


def test_vllm_real_dummy_weights_then_a_checkpoints(tmp_path, model, ours):
    """As training frameworks start an engine."""
    result, said = run(tmp_path, model, "1", model / checkpoint.FILE, load_format="dummy")
    assert len(said) == 1 and result["weights again"] == result["weights"]
    assert result["tokens"] != ours[0]["tokens"] and result["tokens again"] == ours[0]["tokens"]
    assert result["counts again"][1] == 0
