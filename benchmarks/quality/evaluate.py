"""What FP8 projections do to a language model: NLL, KL and top-1 agreement of a small trained one,
held-out text.

    python -m benchmarks.quality.evaluate --json quality.json   trains for minutes the first time, then reads its cache
    python -m benchmarks.quality.evaluate --blocks 32           less text, in seconds

The model has DeepSeek-V3's MLA dims and reads the standard library's sources; docs/accuracy.md says
what it shows. Every row is teacher-forced on the same blocks of held-out text; KL and agreement are
against transformers in fp32.
"""

import argparse
import math
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..bench.layer_tables import ten_thousandths
from ..bench.report import command_of, cpu_environment, grid, parser_of, progress, write_whole
from . import model as models
from . import variants
from .model import Corpus, Recipe

BATCH = 16  # blocks that run at once; per-tensor activations share a scale over them
BLOCKS = 256
SPREADS = (0, 8, 12, 16)  # octaves
WINDOWS = (1, 8, 32)  # characters that a layer sees


@dataclass(frozen=True)
class Row:
    """Means over blocks, with the standard error of that mean; nats per character."""

    part: str
    variant: str
    octaves: int
    nll: float
    nll_se: float
    delta: float | None = None  # NLL over the reference's, character by character
    delta_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    checkpoint_kl: float | None = None  # KL(fp32 arithmetic on the block FP8 weights || variant)
    checkpoint_kl_se: float | None = None
    agreement: float | None = None
    agreement_se: float | None = None


def blocks_of(text: Tensor, context: int, count: int) -> Tensor:
    """int64 [count, context + 1], spread evenly over the text."""
    begin = torch.linspace(0, len(text) - context - 1, count).long()
    return text[begin[:, None] + torch.arange(context + 1)].long()


@torch.no_grad()
def log_probabilities(model: Callable[..., Any], blocks: Tensor, tick: Callable[[], object] = lambda: None) -> Tensor:
    """fp32 [N, S, V]."""
    parts = []
    for batch in blocks[:, :-1].split(BATCH):
        parts.append(model(batch, use_cache=False).logits.double().log_softmax(-1).float())
        tick()
    return torch.cat(parts)


def nll(log_p: Tensor, targets: Tensor) -> Tensor:
    """[N, S, V] and [N, S] -> [N], the mean over each block."""
    return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double().mean(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), [N, S, V] -> [N]: the sum of p ln(p/q) - p + q, of terms that are not negative."""
    ratio = log_q.double() - log_p.double()
    return (log_p.double().exp() * (ratio.expm1() - ratio)).sum(-1).mean(-1)


def agreement(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[N, S, V] -> [N], the share of characters with the same most probable one."""
    return (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(-1)


def mean(blocks: Tensor) -> float:
    return float(blocks.mean())


def error(blocks: Tensor) -> float:
    """Standard error of the mean; blocks lie far apart in the text and count as independent."""
    return float(blocks.std() / math.sqrt(len(blocks)))


def row(part: str, name: str, octaves: int, log_p: Tensor, want: Tensor, checkpoint: Tensor, targets: Tensor) -> Row:
    losses, kls, same = nll(log_p, targets), kl(want, log_p), agreement(want, log_p)
    deltas = losses - nll(want, targets)
    measures = {"nll": losses, "delta": deltas, "kl": kls, "agreement": same}
    measures["checkpoint_kl"] = kl(checkpoint, log_p)
    means = {name: mean(blocks) for name, blocks in measures.items()}
    errors = {f"{name}_se": error(blocks) for name, blocks in measures.items()}
    return Row(part, name, octaves, **means, **errors)


def measure(
    model: Any, corpus: Corpus, context: int, count: int, tick: Callable[[], object] = lambda: None
) -> list[Row]:
    blocks = blocks_of(corpus.held_out, context, count)
    targets = blocks[:, 1:]
    rows = [
        Row("baseline", f"counts of {what}", 0, models.ngram_nll(corpus, order), 0.0)
        for order, what in enumerate(("characters", "pairs", "triples"), start=1)
    ]
    uses: dict[str, variants.Variant] = {"attention's output zero": variants.without_attention}
    uses |= {f"seeing {n} characters" if n > 1 else "seeing 1 character": variants.seeing(n) for n in WINDOWS}
    for name, use in uses.items():
        losses = nll(log_probabilities(use(model), blocks, tick), targets)
        rows.append(Row("attention", name, 0, mean(losses), error(losses)))
    want = log_probabilities(variants.hf_fp32(model), blocks, tick)
    checkpoint = log_probabilities(variants.checkpoint_fp32(model), blocks, tick)
    for octaves in SPREADS:
        changed = variants.spread(model, octaves)
        for name in variants.SPREAD_VARIANTS if octaves else variants.VARIANTS:
            log_p = log_probabilities(variants.VARIANTS[name](changed), blocks, tick)
            rows.append(row("variant", name, octaves, log_p, want, checkpoint, targets))
    return rows


def evaluations() -> int:
    """Models that `measure` runs."""
    spreads = (len(SPREADS) - 1) * len(variants.SPREAD_VARIANTS)
    return 1 + len(WINDOWS) + 2 + len(variants.VARIANTS) + spreads


def table(rows: list[Row], where: Mapping[str, object]) -> Table:
    """80 columns; KL and what is over fp32's NLL in 1e-4 nats. The record has standard errors."""
    caption = ", ".join(f"{key} {value}" for key, value in where.items() if key != "recipe")
    columns = ("", "2^", "NLL", "over\nfp32", "KL", "from\nFP8", "same\ntop-1")
    result = grid(None, *columns, narrow=True, caption=caption)
    for column in result.columns:
        column.no_wrap, column.vertical = bool(column.header), "bottom"
    for one in rows:
        cells = [str(one.octaves or ""), f"{one.nll:.4f}"]
        if one.delta is not None and one.kl is not None and one.checkpoint_kl is not None:
            cells += [f"{one.delta * 1e4:+.1f}", ten_thousandths(one.kl), ten_thousandths(one.checkpoint_kl)]
            cells += [f"{one.agreement:.2%}"]
        result.add_row(one.variant, *cells)
    return result


def parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, commit=False)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of held-out text, each as long as the context")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, metavar="DIRECTORY", help="of trained models")
    return parser


def main() -> int:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    console, recipe = Console(), Recipe()
    corpus = models.standard_library()
    where = {**cpu_environment(args.threads), "python": platform.python_version()}
    with progress(console) as bar:
        task = bar.add_task("train", total=recipe.steps)
        show = lambda loss: bar.update(task, advance=1, description=f"train, loss {loss:.3f}")  # noqa: E731
        model, took = models.trained(recipe, corpus, show, args.cache)
        bar.update(task, completed=recipe.steps)
        task = bar.add_task("evaluate", total=evaluations() * math.ceil(args.blocks / BATCH))
        rows = measure(model, corpus, recipe.context, args.blocks, lambda: bar.advance(task))
    where |= {
        "transformers": transformers.__version__,
        "command": command_of(sys.argv),
        "recipe": asdict(recipe),
        "text": corpus.digest[:16],
        "train_characters": len(corpus.train),
        "read_characters": recipe.steps * recipe.batch * recipe.context,
        "held_out_characters": len(corpus.held_out),
        "blocks": args.blocks,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": models.weights_digest(model),
        **{f"train_{name}": round(value) for name, value in took.items()},
    }
    console.print(table(rows, where))
    if args.json:
        write_whole(args.json, map(asdict, rows), where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
