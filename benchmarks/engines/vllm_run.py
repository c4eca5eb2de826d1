"""One variant of vLLM, stock or with the plugin, in one process: what it says, how long it takes, what it holds.

    MLA_FP8_VLLM=0 python -m benchmarks.engines.vllm_run CHECKPOINT --json stock.json
    MLA_FP8_VLLM=1 python -m benchmarks.engines.vllm_run CHECKPOINT --json plugin.json
    python -m benchmarks.engines.compare stock.json plugin.json oracle.json

The variable is the plugin's own switch, and the label of the rows. Measured, each a `measure` of
the rows, by --measure:

    memory     bytes that torch holds after loading, before the cache; blocks of the cache; W_UK_T's and W_UV's class
    greedy     tokens and log-probabilities of some prompts
    forced     64 texts of 64 decode steps each, whose tokens are given: the best token, its lead, the given token's
               log-probability; once for every batch of --forced-batch, so that two batches show what a batch changes
    step       ms a decode step, the host's work included
    timeline   from the end of q_b_proj's GEMM to the start of o_proj's, and the kernels in between
    counts     products run and weights dequantized by the plugin, as its Python saw them; seconds of its hooks

Steps and timelines are of steps in which all sequences decode. Rows are written after every
measure. Status 3: a measure failed; its row has the reason, and the others are there.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model and its counters are in this process

import torch

from ..bench.report import environment, integers, parser_of, write_json
from . import forced
from .decoding import step_row, timeline_row
from .texts import Size, prompt_of, texts

SWITCH = "MLA_FP8_VLLM"
LABELS = {"0": "stock", "1": "plugin"}
GREEDY_PROMPTS = (20, 3, 100, 257)  # tokens of each
GREEDY_TOKENS = 32
ENGINE = {
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "seed": 0,
    "max_model_len": 4096,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": False,
    "gpu_memory_utilization": 0.4,
    "compilation_config": {"cudagraph_capture_sizes": [1, 8, 32, 64, 128]},
}
Rows = list[dict[str, Any]]


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        vllm = importlib.import_module("vllm")
        kinds = importlib.import_module("vllm.sampling_params").RequestOutputKind
        config = json.loads((options.checkpoint / "config.json").read_text())
        self.options, self.vocab_size = options, config["vocab_size"]
        self.params = partial(
            vllm.SamplingParams, temperature=0, ignore_eos=True, detokenize=False, output_kind=kinds.FINAL_ONLY
        )
        began = time.monotonic()
        self.llm = vllm.LLM(model=str(options.checkpoint), **{**ENGINE, **dict(options.engine)})
        self.facts = {
            "label": options.label,
            "engine": f"vllm {vllm.__version__}",
            "engine_options": dict(options.engine),
            "heads": config["num_attention_heads"],
            "layers": config["num_hidden_layers"],
            "ready_seconds": round(time.monotonic() - began, 1),
        }

    def memory(self) -> Rows:
        def held(worker: Any) -> dict[str, Any]:
            runner = worker.model_runner
            layers = [one for one in runner.get_model().modules() if hasattr(one, "W_UV")]
            return {
                "loaded_bytes": int(runner.model_memory_usage),
                "runner": f"{type(runner).__module__}.{type(runner).__name__}",
                "attention": sorted({type(one.impl).__name__ for one in layers}),
                "weights": sorted({type(getattr(one, name)).__name__ for one in layers for name in ("W_UK_T", "W_UV")}),
            }

        cache = self.llm.llm_engine.vllm_config.cache_config
        row = self.llm.collective_rpc(held)[0]
        return [{"measure": "memory", **row, "cache_blocks": cache.num_gpu_blocks, "block_tokens": cache.block_size}]

    def greedy(self) -> Rows:
        prompts = [prompt_of(length, index, self.vocab_size) for index, length in enumerate(GREEDY_PROMPTS)]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self.llm.generate(asked, self.params(max_tokens=GREEDY_TOKENS, logprobs=1), use_tqdm=False)
        rows = []
        for index, answer in enumerate(answers):
            said = answer.outputs[0]
            chosen = [step[token].logprob for step, token in zip(said.logprobs, said.token_ids, strict=True)]
            rows.append({"measure": "greedy", "prompt": index, "tokens": list(said.token_ids), "logprobs": chosen})
        return rows

    def forced(self) -> Rows:
        given = texts(Size(), self.vocab_size)
        logits = torch.float32 if self.options.logits == "float32" else None
        batches = self.options.forced_batch
        return [row for batch in batches for row in forced.rows(self.llm, self.params, given, batch, logits)]

    def step(self) -> Rows:
        context = self.options.step_context
        return [step_row(self.llm, self.params, batch, context, self.vocab_size) for batch in self.options.batch]

    def timeline(self) -> Rows:
        cases = [(batch, context) for context in self.options.context for batch in self.options.batch]
        return [timeline_row(self.llm, self.params, *case, self.vocab_size) for case in cases]

    def counts(self) -> Rows:
        row: dict[str, Any] = {"measure": "counts", "products": None, "dequantizations": None, "load_seconds": None}
        try:
            counts = importlib.import_module("mla_fp8.weights.block_fp8_weight").counts()
            row |= {"products": counts.products, "dequantizations": counts.dequantizations}
            row["load_seconds"] = importlib.import_module("mla_fp8.integrations.vllm").load_seconds
        except (ImportError, AttributeError) as error:
            row["reason"] = str(error)
        return [row]


def attempt(measure: Callable[[], Rows], name: str) -> Rows:
    """Its rows, or the one that says why there are none."""
    try:
        return measure()
    except Exception as error:  # one measure may not cost the others
        traceback.print_exc()
        return [{"measure": name, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}]


def line_of(row: dict[str, Any]) -> str:
    """A row in short, for whoever watches."""
    short = {key: value for key, value in row.items() if not isinstance(value, list) or len(value) < 3}
    if row["measure"] == "greedy" and "tokens" in row:
        short |= {"tokens": row["tokens"][:16], "sum of logprobs": sum(row["logprobs"])}
    if "forced_logprob" in row:
        short["mean forced_logprob"] = statistics.fmean(row["forced_logprob"])
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in short.items()
    )


MEASURES = ("memory", "greedy", "forced", "step", "timeline", "counts")


def setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--measure", type=lambda text: text.split(","), default=MEASURES, help="of " + ",".join(MEASURES)
    )
    parser.add_argument("--batch", type=integers, default=[1, 8, 32, 128], help="of step and timeline")
    parser.add_argument("--context", type=integers, default=[1000, 3500], help="of timeline")
    parser.add_argument("--step-context", type=int, default=256)
    parser.add_argument("--forced-batch", type=integers, default=[8, 64])
    parser.add_argument("--logits", choices=["float32", "model"], default="float32", help="dtype, of forced")
    parser.add_argument(
        "--engine", type=setting, action="append", default=[], metavar="KEY=JSON", help="an argument of vllm.LLM"
    )
    parser.add_argument("--label", help=f"of the rows; default: stock, or plugin where {SWITCH}=1")
    options = parser.parse_args()
    if unknown := [name for name in options.measure if name not in MEASURES]:
        parser.error(f"--measure must be of {','.join(MEASURES)}, got {unknown[0]}")
    options.label = options.label or LABELS.get(os.environ.get(SWITCH, "0"), "plugin")
    return options


def main() -> int:
    options = arguments()
    if not torch.cuda.is_available():
        print("benchmarks.engines.vllm_run: needs a CUDA device")
        return 2
    run, rows = Run(options), Rows()
    facts = environment(options.commit) | run.facts
    for name in options.measure:
        made = attempt(getattr(run, name), name)
        rows += made
        for row in made if name != "forced" or "status" in made[0] else made[:1]:
            print(f"{options.label}: {line_of(row)}", flush=True)
        if options.json:
            write_json(options.json, rows, facts)
    return 3 if any(row.get("status") == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
