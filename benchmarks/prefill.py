"""From how many queries on the expanded way is the faster one, in a layer that `enable` took over.

    python benchmarks/prefill.py [--heads 16,128] [--tokens 128,512,2048,8192] [--device cpu] [--json FILE]

One forward of attention over a cache of `tokens` tokens: absorbed (absorb_q, attend_latents, v_up), and expanded (keys
and values of all heads, then torch's SDPA), with the causal mask that transformers gives to both. The number of queries
is searched by halving; both ways run in turn, and medians decide. On a GPU each is measured twice: in a CUDA graph,
which is the device's time, and eager, call after call, which on few tokens is the host's. `rule` is what enable() uses
where prefill_threshold is None: absorbed_layer.absorbed_is_cheaper. Ways that differ by more than BOUND end with
status 1.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timing
import torch
from gpu import integers
from report import environment, origin, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from mla_fp8.integrations.absorbed_layer import DIMS, absorbed_is_cheaper
from mla_fp8.integrations.transformers import NAME, attention_forward, enable

ROUNDS = 7
ROUND_US = 5000.0  # of calls one after another
GRAPH_CALLS = 4
EAGER, GRAPH = "eager", "graph"
# Two FP8 roundings of normal data, of q and of o_latent (2.6e-2 each), and of both weights.
BOUND = 6e-2


def layer_of(heads: int, device: torch.device) -> Any:
    """One enabled attention layer with DeepSeek-V3's head dims."""
    config = DeepseekV3Config(hidden_size=256, q_lora_rank=256, num_attention_heads=heads, num_key_value_heads=heads)
    config._attn_implementation = "sdpa"
    with device:
        layer = DeepseekV3Attention(config, layer_idx=0).eval()
    layer.kv_b_proj.weight.data.normal_(std=layer.kv_lora_rank**-0.5)
    layer = layer.bfloat16()
    enable(layer)
    return layer


def inputs(layer: Any, queries: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query [1, H, S, D+P], the latent cache [1, 1, T, R] and [1, 1, T, P], the mask of a chunk at the cache's end."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    query = torch.randn(1, layer.num_heads, queries, layer.qk_head_dim, **options)
    latent = torch.randn(1, 1, tokens, layer.kv_lora_rank, **options)
    k_rot = torch.randn(1, 1, tokens, layer.qk_rope_head_dim, **options)
    mask = torch.ones(1, 1, queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)
    return query, latent, k_rot, mask


def us_of(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Of one of several calls, one after another without waiting."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e6 / calls


def eager_us(ways: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    calls = {name: max(1, round(ROUND_US / us_of(way, 1, device))) for name, way in ways.items()}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            samples[name].append(us_of(way, calls[name], device))
    return samples


def both(layer: Any, queries: int, tokens: int, device: torch.device, launched: str = EAGER) -> tuple[float, float]:
    """Median µs absorbed and expanded. Raises ValueError where they differ."""
    arguments = inputs(layer, queries, tokens, device)

    def way(threshold: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            getattr(layer, NAME).prefill_threshold = threshold
            return attention_forward(layer, *arguments, scaling=layer.scaling)[0]

        return call

    absorbed, expanded = way(queries + 1), way(1)
    got, want = absorbed().double(), expanded().double()
    if not (error := float((got - want).norm() / want.norm())) < BOUND:
        raise ValueError(f"{queries} queries on {tokens} tokens: the ways differ by {error:.1e}, allowed {BOUND}")
    ways = {"absorbed": absorbed, "expanded": expanded}
    if launched == GRAPH:
        samples = timing.interleave({name: timing.capture([w], GRAPH_CALLS) for name, w in ways.items()}, ROUNDS)
    else:
        samples = eager_us(ways, device)
    return statistics.median(samples["absorbed"]), statistics.median(samples["expanded"])


def crossover(layer: Any, tokens: int, device: torch.device, launched: str = EAGER) -> dict[str, object]:
    """The fewest queries for which the expanded way is the faster, by halving; tokens + 1 where it never is."""
    low, high = 1, tokens + 1
    while low < high:
        middle = (low + high) // 2
        absorbed_us, expanded_us = both(layer, middle, tokens, device, launched)
        low, high = (low, middle) if expanded_us < absorbed_us else (middle + 1, high)
    absorbed_us, expanded_us = both(layer, min(low, tokens), tokens, device, launched)
    dims = [getattr(layer, dim) for dim in DIMS]
    dearer = (s for s in range(1, tokens + 1) if not absorbed_is_cheaper(s, tokens, *dims, device=device.type))
    rule = next(dearer, tokens + 1)
    row: dict[str, object] = {"mode": "prefill", "launched": launched, "heads": layer.num_heads, "tokens": tokens}
    return row | {"queries": low, "rule": rule, "absorbed_us": absorbed_us, "expanded_us": expanded_us}


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=integers, default=[16, 128])
    parser.add_argument("--tokens", type=integers, default=[128, 512, 2048, 8192], help="in the cache")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write one JSON object a row")
    parser.add_argument("--commit", help="for the JSON rows, where git cannot tell")
    options = parser.parse_args()
    console, device = Console(width=None if sys.stdout.isatty() else 120), torch.device(options.device)
    layers = {heads: layer_of(heads, device) for heads in options.heads}
    launched = (GRAPH, EAGER) if device.type == "cuda" else (EAGER,)
    cases = [(layer, tokens, device, how) for how in launched for layer in layers.values() for tokens in options.tokens]
    try:
        rows = [crossover(*case) for case in track(cases, "prefill", console=console)]
    except ValueError as error:
        console.print(f"wrong result: {error}", style="bold red", markup=False)
        return 1
    table = Table("launched", "H", "tokens", "expanded from, queries", "rule", "µs absorbed there", "expanded")
    for row in rows:
        times = (f"{row[name]:.0f}" for name in ("absorbed_us", "expanded_us"))
        table.add_row(*(str(row[name]) for name in ("launched", "heads", "tokens", "queries", "rule")), *times)
    console.print(table)
    facts = environment(options.commit)
    console.print(origin(facts))
    if options.json:
        write_json(options.json, rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
