"""Stock beside the plugin: a table a measure, and for every bar whether it is kept.

    python -m benchmarks.engines.compare stock.json plugin.json oracle.json

Files are those of vllm_run and oracle, of one checkpoint, in any order. Log-probabilities are in
nats. m is the largest difference between two stock runs of one text that differ in batch only, so
what is smaller than m says nothing. Status 1: a bar is not kept; 4: nothing to compare was found
for one.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ..bench.report import console_of, grid, microseconds, number, read, write_json
from .oracle import LABEL as ORACLE

STOCK, PLUGIN = "stock", "plugin"
LEAST_MARGIN = 0.05  # nats: below it two tokens are equally good
LEAST_POSITIONS = 2000
STANDARD_ERRORS = 2.0
FULL_HEADS = 128
SHORTER_US = {1: 5.0, 8: 5.0, 32: 4.5}  # by batch, with FULL_HEADS; for all others: not longer
LAYER_BYTES = 16.7e6  # 128*256*512 in 8 bits instead of 16, less scales: so many fewer, with FULL_HEADS
MODEL_LAYERS, HOOK_SECONDS = 61, 2.0  # DeepSeek-V3's, and what loading all of them may take
KEPT, BROKEN, MISSING = "kept", "NOT KEPT", "not measured"
FACTS = ("gpu", "driver", "torch", "commit", "date", "command")  # of a run

Row = Mapping[str, Any]
Positions = dict[tuple[int, int], "Said"]  # by text and step


class Said(NamedTuple):
    """Of one position of a forced text."""

    best: int
    best_logprob: float
    second_logprob: float
    forced_logprob: float


class Verdict(NamedTuple):
    bar: str
    found: str
    kept: bool | None  # None: not measured

    @property
    def word(self) -> str:
        return MISSING if self.kept is None else KEPT if self.kept else BROKEN


def chosen(rows: Iterable[Row], measure: str, label: str) -> list[Row]:
    return [row for row in rows if row["measure"] == measure and row["label"] == label and "status" not in row]


def positions(rows: Iterable[Row]) -> Positions:
    fields = Said._fields
    return {
        (row["sequence"], step): Said(*values)
        for row in rows
        for step, values in enumerate(zip(*(row[field] for field in fields), strict=True))
    }


def by_batch(rows: Sequence[Row], label: str) -> dict[int, Positions]:
    found = chosen(rows, "forced", label)
    return {
        batch: positions(row for row in found if row["batch"] == batch) for batch in {row["batch"] for row in found}
    }


def batch_noise(stock: Mapping[int, Positions]) -> float | None:
    """m, over the given token of every position, and the best one where both runs have the same."""
    largest: float | None = None
    batches = sorted(stock)
    for index, first in enumerate(batches):
        for second in batches[index + 1 :]:
            for place in stock[first].keys() & stock[second].keys():
                one, other = stock[first][place], stock[second][place]
                differences = [abs(one.forced_logprob - other.forced_logprob)]
                if one.best == other.best:
                    differences.append(abs(one.best_logprob - other.best_logprob))
                largest = max(largest or 0.0, *differences)
    return largest


def same_best(stock: Mapping[int, Positions], plugin: Mapping[int, Positions], noise: float | None) -> Verdict:
    least = max(LEAST_MARGIN, 2 * (noise or 0.0))
    bar = f"same best token where stock's lead is above max({LEAST_MARGIN}, 2m) = {least:.3f}"
    pairs = [
        (stock[batch][place], plugin[batch][place])
        for batch in stock.keys() & plugin.keys()
        for place in stock[batch].keys() & plugin[batch].keys()
    ]
    if noise is None or not pairs:
        return Verdict(bar, "needs stock of two batches, and the plugin of one of them", None)
    clear = [(one, other) for one, other in pairs if one.best_logprob - one.second_logprob > least]
    wrong = sum(one.best != other.best for one, other in clear)
    all_wrong = sum(one.best != other.best for one, other in pairs)
    found = f"{wrong} of {len(clear)} differ; of all {len(pairs)}: {all_wrong}"
    places = max(len(stock[batch].keys() & plugin[batch].keys()) for batch in stock.keys() & plugin.keys())
    if places < LEAST_POSITIONS:
        return Verdict(bar, f"{found}; at least {LEAST_POSITIONS} positions, got {places}", False)
    return Verdict(bar, found, wrong == 0)


def distance(batch: int, stock: Positions, plugin: Positions, oracle: Positions) -> Verdict:
    """|engine - oracle| of the given token, a pair a position, so that the texts' own spread cancels."""
    bar = f"batch {batch}: mean distance from fp32 at most {STANDARD_ERRORS:.0f} standard errors above stock's"
    places = sorted(stock.keys() & plugin.keys() & oracle.keys())
    if len(places) < 2:
        return Verdict(bar, "needs stock, plugin and oracle", None)
    pairs = [
        tuple(abs(run[place].forced_logprob - oracle[place].forced_logprob) for run in (stock, plugin))
        for place in places
    ]
    more = [ours - theirs for theirs, ours in pairs]
    mean, error = statistics.fmean(more), statistics.stdev(more) / math.sqrt(len(more))
    stock_mean, plugin_mean = (statistics.fmean(side) for side in zip(*pairs, strict=True))
    found = f"stock {stock_mean:.5f}, plugin {plugin_mean:.5f}, difference {mean:+.5f} ± {error:.5f} ({len(places)})"
    return Verdict(bar, found, mean <= STANDARD_ERRORS * error)


def accuracy(rows: Sequence[Row]) -> list[Verdict]:
    stock, plugin = by_batch(rows, STOCK), by_batch(rows, PLUGIN)
    oracle = positions(chosen(rows, "forced", ORACLE))
    noise = batch_noise(stock)
    said = Verdict("m, the largest difference by batch alone", number(noise, 4), None if noise is None else True)
    shared = sorted(stock.keys() & plugin.keys())
    return [said, same_best(stock, plugin, noise), *(distance(at, stock[at], plugin[at], oracle) for at in shared)]


def paired(rows: Sequence[Row], measure: str, *keys: str) -> list[tuple[Row, Row]]:
    """Stock and plugin of one case, in the order of stock's."""
    plugin = {tuple(row[key] for key in keys): row for row in chosen(rows, measure, PLUGIN)}
    stock = chosen(rows, measure, STOCK)
    return [(row, plugin[case]) for row in stock if (case := tuple(row[key] for key in keys)) in plugin]


def unmeasured(rows: Sequence[Row], *measures: str) -> list[Verdict]:
    """A verdict for each measure that stock or the plugin has no rows of; stock has no counts."""
    needed = {measure: (PLUGIN,) if measure == "counts" else (STOCK, PLUGIN) for measure in measures}
    missing = {
        measure: [label for label in labels if not chosen(rows, measure, label)] for measure, labels in needed.items()
    }
    return [Verdict(measure, f"needs {' and '.join(without)}", None) for measure, without in missing.items() if without]


def show(table: Table, console: Console) -> None:
    if table.row_count:
        console.print(table)


def times(rows: Sequence[Row], console: Console) -> list[Verdict]:
    verdicts = []
    table = grid("q_b_proj's end to o_proj's start, µs", "batch", "context", "stock", "plugin", "less", left=0)
    for stock, plugin in paired(rows, "timeline", "batch", "context"):
        less = stock["us"] - plugin["us"]
        table.add_row(str(stock["batch"]), str(stock["context"]), *map(microseconds, (stock["us"], plugin["us"], less)))
        wanted = SHORTER_US.get(stock["batch"], 0.0) if stock["heads"] == FULL_HEADS else 0.0
        bar = f"batch {stock['batch']}, context {stock['context']}: at least {wanted} µs shorter"
        verdicts.append(Verdict(bar, f"{less:.2f}", less >= wanted))
    show(table, console)
    table = grid("a decode step, ms", "batch", "context", "stock", "from", "to", "plugin", "from", "to", left=0)
    for stock, plugin in paired(rows, "step", "batch", "context"):
        cells = [number(row[key], 3) for row in (stock, plugin) for key in ("ms", "ms_min", "ms_max")]
        table.add_row(str(stock["batch"]), str(stock["context"]), *cells)
        bar = f"batch {stock['batch']}, context {stock['context']}: a step not longer"
        verdicts.append(Verdict(bar, f"{plugin['ms'] - stock['ms']:+.3f} ms", plugin["ms"] <= stock["ms"]))
    show(table, console)
    return verdicts + unmeasured(rows, "timeline", "step")


def held(rows: Sequence[Row]) -> list[Verdict]:
    verdicts = []
    for stock, plugin in paired(rows, "memory"):
        wanted = LAYER_BYTES * stock["heads"] / FULL_HEADS
        less = (stock["loaded_bytes"] - plugin["loaded_bytes"]) / stock["layers"]
        blocks = plugin["cache_blocks"] - stock["cache_blocks"]
        bar = f"memory: {wanted / 1e6:.1f} MB a layer less"
        verdicts.append(Verdict(bar, f"{less / 1e6:.2f} MB less, {blocks:+} cache blocks", less >= wanted))
    for row in chosen(rows, "counts", PLUGIN):
        found = f"{row['products']} products, {row['dequantizations']} dequantized"
        counted = row["products"] is not None
        kept = (row["products"] > 0 and row["dequantizations"] == 0) if counted else None
        verdicts.append(Verdict("products run, none dequantized", found, kept))
        seconds = row["load_seconds"]
        model = None if seconds is None else seconds / row["layers"] * MODEL_LAYERS
        bar = f"hooks at load of {MODEL_LAYERS} layers: at most {HOOK_SECONDS} s"
        verdicts.append(Verdict(bar, number(model, 3, " s"), None if model is None else model <= HOOK_SECONDS))
    return verdicts + unmeasured(rows, "memory", "counts")


def greedy(rows: Sequence[Row], console: Console) -> None:
    table = grid("greedy tokens", "prompt", "tokens", "equal from the first on", left=0)
    for stock, plugin in paired(rows, "greedy", "prompt"):
        pairs = list(zip(stock["tokens"], plugin["tokens"], strict=True))
        equal = next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))
        table.add_row(str(stock["prompt"]), str(len(pairs)), str(equal))
    show(table, console)


def record(path: Path, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    """What tables.py fills docs/engines.md from: every row but the texts', and the verdicts."""
    kept = [row for row in rows if row["measure"] not in ("forced", "greedy")]
    shared = {key: kept[-1][key] for key in ("heads", "layers", "engine", *FACTS)}
    judged = [{"measure": "verdict", **verdict._asdict(), **shared} for verdict in verdicts]
    write_json(path, [*kept, *judged], {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--record", type=Path, help="write all but the texts' rows, and the verdicts, as JSON")
    options = parser.parse_args()
    rows, console = [row for file in options.files for row in read(file)], console_of()
    if len({(row["heads"], row["layers"]) for row in rows}) > 1:
        parser.error("FILES must be of one checkpoint, got rows of several numbers of heads or layers")
    greedy(rows, console)
    verdicts = [*times(rows, console), *held(rows), *accuracy(rows)]
    table = grid("bars", "bar", "found", "", left=3)
    for verdict in verdicts:
        table.add_row(verdict.bar, verdict.found, verdict.word, style="bold red" if verdict.kept is False else "")
    console.print(table)
    for row in rows:
        if "status" in row:
            console.print(f"{row['label']} {row['measure']}: {row['reason']}", style="bold red", markup=False)
    if options.record:
        record(options.record, rows, verdicts)
    if any(verdict.kept is False for verdict in verdicts):
        return 1
    return 4 if any(verdict.kept is None for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
