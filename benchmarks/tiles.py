"""Times every tile that can run a problem, beside the one that select_config chooses.

    python benchmarks/tiles.py                              a table; status 1 if a choice is over LIMIT of the best
    python benchmarks/tiles.py --json tiles.json --s 1,64 --heads 16,128

Same buffers, rotation and interleaving as benchmarks/gpu.py. A tile's result must have the chosen one's bits.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import measure
import timing
import torch
from contenders import ours
from gpu import integers, side_names
from report import environment, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sides import SIDES, Side, device_of

from mla_fp8.config import candidates, forced_tile, select_config

LIMIT = 1.05


def compare(side: Side, s: int, heads: int, replays: int) -> dict[str, object]:
    """Median µs of each tile, the chosen one and its time over the best's."""
    asked = side.problem(s, heads)
    symbols = [one.config.tile.symbol for one in candidates(asked) if one.kept]
    case = measure.Case(side, s, heads)
    sets = case.sets()
    call = ours(side)[0].call  # the op; after it come its parts
    call(sets[0])
    want = sets[0].result("out").view(torch.uint8).clone()
    captured = {}
    for symbol in symbols:
        with forced_tile(symbol):
            sets[0].poison("out")
            call(sets[0])
            if not torch.equal(sets[0].result("out").view(torch.uint8), want):
                raise measure.WrongResult(f"{case.title}: {symbol} gives other bits than the chosen tile")
            captured[symbol] = timing.capture([partial(call, one) for one in sets], case.launches(len(sets)))
    us = {symbol: timing.Timing.of(samples).us for symbol, samples in timing.interleave(captured, replays).items()}
    chosen = select_config(asked, device_of(torch.cuda.get_device_name())).tile.symbol
    over = us[chosen] / min(us.values())
    row: dict[str, object] = {"side": side.name, "s": s, "heads": heads, "chosen": chosen, "over_best": over, "us": us}
    del captured, sets
    measure.release()
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--s", type=integers, default=[1, 16, 64, 128, 512, 2048, 8192])
    parser.add_argument("--heads", type=integers, default=[128])
    parser.add_argument("--sides", type=side_names, default=list(SIDES))
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write one JSON object a row")
    parser.add_argument("--commit", help="for the JSON rows, where git cannot tell")
    options = parser.parse_args()
    cases = [(SIDES[name], s, heads) for name in options.sides for heads in options.heads for s in options.s]
    console = Console()
    rows = [compare(*case, options.replays) for case in track(cases, "tiles", console=console)]
    table = Table("side", "H", "S", "chosen", "over best", "µs of each tile")
    for row in rows:
        us = row["us"]
        assert isinstance(us, dict)
        times = ", ".join(f"{symbol} {time:.2f}" for symbol, time in sorted(us.items(), key=lambda item: item[1]))
        table.add_row(*(str(row[key]) for key in ("side", "heads", "s", "chosen")), f"{row['over_best']:.3f}", times)
    console.print(table)
    if options.json:
        write_json(options.json, rows, environment(options.commit))
    return int(any(float(str(row["over_best"])) > LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
