"""From how many queries on the expanded way is the faster one, in a layer that `enable` took over.

    python -m benchmarks.layers.prefill [--heads 16,128] [--tokens 128,512,2048,8192] [--device cpu] [--json FILE]

One forward of attention over a cache of `tokens` tokens: absorbed (absorb_q, attend_latents, v_up),
and expanded (keys and values of all heads, then torch's SDPA), with the causal mask that
transformers gives to both. The number of queries is searched by halving; both ways run in turn, and
medians decide. On a GPU each is measured twice: in a CUDA graph, which is the device's time, and
eager, call after call, which on few tokens is the host's. `rule` is what enable() uses where
prefill_threshold is None: absorbed_layer.absorbed_is_cheaper. Ways that differ by more than BOUND
end with status 1.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from mla_fp8.integrations.absorbed_layer import DIMS, absorbed_is_cheaper
from mla_fp8.integrations.transformers import NAME, attention_forward, enable

from ..bench import timing
from ..bench.measure import relative_error
from ..bench.report import console_of, environment, finish, grid, integers, parser_of

ROUNDS = 7
ROUND_US = 5000.0  # of calls one after another
GRAPH_CALLS = 4
EAGER, GRAPH = "eager", "graph"
# The absorbed way has both weights in FP8 (2.6e-2 each, together 3.7e-2), the expanded one has not;
# exact activations add nothing that shows.
BOUND = 4.2e-2


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
    """query [1,H,S,D+P], the cache [1,1,T,R] and [1,1,T,P], the mask of a chunk at its end."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    query = torch.randn(1, layer.num_heads, queries, layer.qk_head_dim, **options)
    latent = torch.randn(1, 1, tokens, layer.kv_lora_rank, **options)
    k_rot = torch.randn(1, 1, tokens, layer.qk_rope_head_dim, **options)
    mask = torch.ones(1, 1, queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)
    return query, latent, k_rot, mask


def eager_us(ways: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    once = {name: timing.called_us(way, 1, device, wait=True) for name, way in ways.items()}
    measures = {
        name: partial(timing.called_us, way, max(1, round(ROUND_US / once[name])), device, wait=True)
        for name, way in ways.items()
    }
    return timing.in_turn(measures, ROUNDS)


def both(layer: Any, queries: int, tokens: int, device: torch.device, launched: str = EAGER) -> tuple[float, float]:
    """Median µs absorbed and expanded. Raises ValueError where they differ."""
    arguments = inputs(layer, queries, tokens, device)

    def way(threshold: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            getattr(layer, NAME).prefill_threshold = threshold
            return attention_forward(layer, *arguments, scaling=layer.scaling)[0]

        return call

    absorbed, expanded = way(queries + 1), way(1)
    if not (error := relative_error(absorbed(), expanded())) < BOUND:
        raise ValueError(f"{queries} queries on {tokens} tokens: the ways differ by {error:.1e}, allowed {BOUND}")
    ways = {"absorbed": absorbed, "expanded": expanded}
    if launched == GRAPH:
        samples = timing.interleave({name: timing.capture([w], GRAPH_CALLS) for name, w in ways.items()}, ROUNDS)
    else:
        samples = eager_us(ways, device)
    return statistics.median(samples["absorbed"]), statistics.median(samples["expanded"])


def crossover(layer: Any, tokens: int, device: torch.device, launched: str = EAGER) -> dict[str, object]:
    """The fewest queries for which the expanded way is faster; tokens + 1 where it never is."""
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


def parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--heads", type=integers, default=[16, 128])
    parser.add_argument("--tokens", type=integers, default=[128, 512, 2048, 8192], help="in the cache")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


@torch.no_grad()
def main() -> int:
    options, console = parser().parse_args(), console_of()
    device = torch.device(options.device)
    layers = {heads: layer_of(heads, device) for heads in options.heads}
    launched = (GRAPH, EAGER) if device.type == "cuda" else (EAGER,)
    cases = [(layer, tokens, device, how) for how in launched for layer in layers.values() for tokens in options.tokens]
    try:
        rows = [crossover(*case) for case in track(cases, "prefill", console=console)]
    except ValueError as error:
        console.print(f"wrong result: {error}", style="bold red", markup=False)
        return 1
    columns = ("launched", "H", "tokens", "expanded from, queries", "rule", "µs absorbed there", "expanded")
    table = grid(None, *columns)
    for row in rows:
        times = (f"{row[name]:.0f}" for name in ("absorbed_us", "expanded_us"))
        table.add_row(*(str(row[name]) for name in ("launched", "heads", "tokens", "queries", "rule")), *times)
    console.print(table)
    finish(console, options, rows, environment(options.commit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
