"""The bytes that an op moves to and from DRAM, by Nsight Compute's counters, beside those that it cannot avoid.

    python benchmarks/dram_bytes.py [--s 2048,8192] [--heads 128] [--json FILE]

Needs `ncu` and the right to read counters. Each op runs once with cold caches. What is still in L2 when a kernel ends
has not been written yet, up to L2's size; the table says how much that can be. Status 1 if read and written bytes
together are off by more than 5%, that rest aside.
"""

import argparse
import csv
import io
import subprocess
import sys
from pathlib import Path

import torch
from buffers import Buffers
from contenders import ours
from gpu import integers
from report import environment, write_json
from rich.console import Console
from rich.table import Table
from sides import SIDES

METRICS = {"read": "dram__bytes_read.sum", "written": "dram__bytes_write.sum"}
KERNELS = "regex:^(absorb_q|v_up|bmm)_"
LIMIT = 0.05


def launch(s: int, heads: int) -> None:
    """What ncu watches: one launch a side."""
    for side in SIDES.values():
        ours(side)[0].call(Buffers(side, s, heads, {}, seed=0))
        torch.cuda.synchronize()


def counted(s: int, heads: int) -> list[tuple[str, dict[str, float]]]:
    """A kernel's name and its bytes, a side after the other."""
    command = ["ncu", "--csv", "--print-units", "base", "--clock-control", "none", "--kernel-name", KERNELS]
    command += ["--metrics", ",".join(METRICS.values()), sys.executable, __file__, "--launch"]
    result = subprocess.run([*command, "--s", str(s), "--heads", str(heads)], capture_output=True, text=True)
    begin = result.stdout.find('"ID"')
    if begin < 0:
        raise SystemExit(f"benchmarks/dram_bytes.py: ncu gave no counters: {(result.stderr or result.stdout)[-500:]}")
    kernels: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(io.StringIO(result.stdout[begin:])):
        _, values = kernels.setdefault(row["ID"], (row["Kernel Name"], {}))
        for name, metric in METRICS.items():
            if row["Metric Name"] == metric:
                values[name] = float(row["Metric Value"].replace(",", ""))
    return list(kernels.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--s", type=integers, default=[2048, 8192])
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write one JSON object a row")
    parser.add_argument("--commit", help="for the JSON rows, where git cannot tell")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.launch:
        launch(options.s[0], options.heads)
        return 0
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    table = Table(
        "S", "kernel", "MB read", "unavoidable", "MB written", "unavoidable", "all, off by", "left in L2, at most"
    )
    rows: list[dict[str, object]] = []
    for s in options.s:
        for side, (kernel, got) in zip(SIDES.values(), counted(s, options.heads), strict=True):
            read = side.read_bytes(s, options.heads) + side.weight_bytes(options.heads)
            written = side.written_bytes(s, options.heads)
            left = min(l2_bytes, written) / (read + written)
            off = (got["read"] + got["written"]) / (read + written) - 1
            megabytes = [f"{value / 1e6:.1f}" for value in (got["read"], read, got["written"], written)]
            table.add_row(str(s), kernel, *megabytes, f"{off:+.1%}", f"{left:.1%}")
            row = {"mode": "dram_bytes", "side": side.name, "s": s, "heads": options.heads, "kernel": kernel}
            rows.append(
                {**row, **got, "read_model": read, "written_model": written, "off_by": off, "left_at_most": left}
            )
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    if options.json:
        write_json(options.json, rows, environment(options.commit))
    return int(any(not -float(str(r["left_at_most"])) - LIMIT <= float(str(r["off_by"])) <= LIMIT for r in rows))


if __name__ == "__main__":
    sys.exit(main())
