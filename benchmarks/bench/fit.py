"""Fits the cost model's times of every tile to a record of tiles.py.

    python -m benchmarks.bench.fit [benchmarks/results/tiles.json] [--seconds 60]

Prints start_us, first_us, next_us and term_us for csrc/kernels/sm90/tiles.h, rounded to 0.1 us, and which
cells are still chosen over LIMIT of the best tile's time. What is minimized: by how much the chosen
tiles exceed the best, and the squared logarithm of modelled over measured time of tiles near the
best (of the others with little weight), so that a time that is shown is near what is measured.
Simulated annealing from the present values; it takes the same steps only at the same speed.
"""

import argparse
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_fp8.config import Device, candidates, tiles
from mla_fp8.formats import GROUP

from . import report, tables
from .sides import SIDES
from .tables import LIMIT

CLOSE = 1.03  # what a choice may exceed the best by at no cost
NEAR = 1.3  # tiles whose modelled time has to be right
CHOICE_WEIGHT, ERROR_WEIGHT, FAR_ERROR_WEIGHT = 20.0, 300.0, 3.0
STEP_US = 0.1
LEAST_LAUNCH_US = 0.0  # in all: the model takes no less
VAIN_WAIT_US = 40000 / 1.75e3  # csrc/kernels/phases.h
Times = dict[str, list[float]]  # symbol -> start, first, next, term


@dataclass
class SideCells:
    """All cells of a side: [cells, tiles] of what the model has, infinite where a tile is not timed."""

    symbols: list[str]
    cells: list[tuple[str, int, int]]
    measured: Tensor
    fixed_squared: Tensor  # dram^2 + l2^2 + mma^2
    further: Tensor  # tiles in turn, beyond the first
    blocks: Tensor
    vain: Tensor
    terms: int  # of all, beyond the first

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> "SideCells":
        present = {tile.symbol for tile in tiles()}  # a record may have some that are gone
        symbols = sorted(present & {symbol for row in rows for symbol in tables.tile_times(row)})
        parts = {name: torch.zeros(len(rows), len(symbols), dtype=torch.float64) for name in ("f", "w", "b", "v")}
        measured = torch.full((len(rows), len(symbols)), math.inf, dtype=torch.float64)
        for i, row in enumerate(rows):
            problem = SIDES[row["side"]].problem(row["s"], row["heads"], row["activations"])
            device = Device(**row["device"])
            times = tables.tile_times(row)
            for one in candidates(problem, device):
                config, tile = one.config, one.config.tile
                if tile.symbol not in times:
                    continue
                j, cost = symbols.index(tile.symbol), one.cost
                measured[i, j] = times[tile.symbol]
                parts["f"][i, j] = cost.dram_us**2 + cost.l2_us**2 + cost.mma_us**2
                parts["w"][i, j] = config.waves - 1
                parts["b"][i, j] = 1 if tile.k else problem.k / GROUP
                parts["v"][i, j] = tile.phased and config.grid_x > device.num_sms * config.ctas_per_sm
        cells = [(f"{row['side']} {row['activations']}", row["heads"], row["s"]) for row in rows]
        return cls(symbols, cells, measured, parts["f"], parts["w"], parts["b"], parts["v"], problem.terms - 1)

    def modelled(self, times: Times) -> Tensor:
        start, first, following, term = torch.tensor([times[one] for one in self.symbols], dtype=torch.float64).T
        sm = (first + self.terms * term + self.further * (following + self.terms * term)) * self.blocks
        us = Device().launch_us + start + self.vain * VAIN_WAIT_US + (self.fixed_squared + sm**2).sqrt()
        return torch.where(self.measured.isfinite(), us, math.inf)

    def over_best(self, modelled: Tensor) -> Tensor:
        chosen = self.measured.gather(1, modelled.argmin(1, keepdim=True)).squeeze(1)
        return chosen / self.measured.amin(1)

    def log_errors(self, modelled: Tensor, near: float) -> Tensor:
        """Of the tiles that take at most `near` times the best one's time."""
        kept = self.measured.isfinite() & (self.measured < near * self.measured.amin(1, keepdim=True))
        return (modelled[kept] / self.measured[kept]).log()

    def loss(self, times: Times) -> float:
        modelled = self.modelled(times)
        over = self.over_best(modelled)
        choice = CHOICE_WEIGHT * (over - CLOSE).clamp(min=0).sum() + (over > LIMIT).sum()
        near, far = self.log_errors(modelled, NEAR), self.log_errors(modelled, math.inf)
        return float(choice + ERROR_WEIGHT * near.square().mean() + FAR_ERROR_WEIGHT * far.square().mean())


def anneal(sides: list[SideCells], times: Times, seconds: float) -> Times:
    source, began = random.Random(0), time.monotonic()
    users = {symbol: [i for i, side in enumerate(sides) if symbol in side.symbols] for symbol in times}
    moving = [symbol for symbol, used in users.items() if used]
    losses = [side.loss(times) for side in sides]
    best, least = {name: list(values) for name, values in times.items()}, sum(losses)
    while (left := 1 - (time.monotonic() - began) / seconds) > 0:
        symbol = source.choice(moving)
        old, new = times[symbol], list(times[symbol])
        step, which = source.choice([-1, 1]) * source.choice([1, 1, 2, 3]) * STEP_US, source.randrange(5)
        new[which % 4] += step
        if which == 4:  # from a launch's start to its first tile
            new[1] -= step
        new = [round(value, 1) + 0.0 for value in new]  # never -0.0
        if new[0] + Device().launch_us < LEAST_LAUNCH_US or min(new[1:]) < 0:
            continue
        times[symbol] = new
        changed = {i: sides[i].loss(times) for i in users[symbol]}
        worse = sum(changed[i] - losses[i] for i in changed)
        if worse <= 0 or source.random() < math.exp(-worse / (2 * left + 1e-3)):
            for i, value in changed.items():
                losses[i] = value
            if sum(losses) < least:
                best, least = {name: list(values) for name, values in times.items()}, sum(losses)
        else:
            times[symbol] = old
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, nargs="?", default=report.RESULTS / "tiles.json")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    rows = report.read(options.record)
    by_side = defaultdict(list)
    for row in rows:
        by_side[row["side"], row["activations"]].append(row)
    sides = [SideCells.of(some) for some in by_side.values()]
    times = {tile.symbol: [tile.start_us, tile.first_us, tile.next_us, tile.term_us] for tile in tiles()}
    fitted = anneal(sides, times, options.seconds)
    for symbol, values in fitted.items():
        print(f"{symbol:32}", ", ".join(f"{value:.1f}" for value in values))
    for side in sides:
        modelled = side.modelled(fitted)
        over, errors = side.over_best(modelled), side.log_errors(modelled, NEAR)
        print(f"{side.cells[0][0]:13} rms error {errors.square().mean().sqrt():.3f}, largest {errors.abs().max():.3f}")
        for i in over.argsort(descending=True)[: int((over > LIMIT).sum())].tolist():
            chosen, best = side.symbols[modelled[i].argmin()], side.symbols[side.measured[i].argmin()]
            print(f"    H = {side.cells[i][1]}, S = {side.cells[i][2]}: {over[i]:.3f}, {chosen} beside {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
