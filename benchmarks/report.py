"""Tables on the terminal and JSON lines, each with the machine and software that it was measured on."""

import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measure import FLOOR, Row
from rich.console import Console
from rich.table import Table


def output_of(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def environment(commit: str | None = None) -> dict[str, str | None]:
    """What every JSON row says about its origin; `commit` for a checkout without its history."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    return {
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "driver": output_of(query),
        "torch": torch.__version__,
        "commit": commit or output_of(["git", "describe", "--always", "--dirty", "--exclude=*"]),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }


def origin(facts: Mapping[str, str | None]) -> str:
    """One line under a table."""
    return ", ".join(f"{key} {facts[key]}" for key in ("gpu", "driver", "torch", "commit", "date"))


def write_json(path: Path, rows: Iterable[Row | dict[str, Any]], facts: Mapping[str, str | None]) -> None:
    lines = [json.dumps({**(row if isinstance(row, dict) else asdict(row)), **facts}) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"


def microseconds(value: float | None) -> str:
    """Three or four significant digits."""
    return (
        "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
    )


def table(title: str, rows: Sequence[Row], where: str) -> Table:
    """One case: a line a contender, the fastest first; what did not run comes last, with the reason."""
    own = next((row for row in rows if row.ours and row.us is not None), None)
    table = Table(title=title, title_justify="left", caption=where, caption_justify="left")
    for column in ("contender", "µs", "p20", "p80", "GB/s", "% of stream", "over floor", "over ours"):
        table.add_column(column, justify="left" if column == "contender" else "right", overflow="fold")
    for row in sorted(rows, key=lambda row: row.us if row.us is not None else float("inf")):
        name = f"{row.contender} ({row.config})" if row.config and row.contender != FLOOR else row.contender
        if row.us is None:
            table.add_row(f"{name}: {row.status}{': ' if row.reason else ''}{row.reason}", *[""] * 7, style="dim")
            continue
        over_own = row.us / own.us if own is not None and own.us is not None else None
        cells = [microseconds(row.us), microseconds(row.us_p20), microseconds(row.us_p80), number(row.gbps, 0)]
        cells += [number(row.percent_of_stream, 1), number(row.over_floor, 2, "x"), number(over_own, 2, "x")]
        table.add_row(name, *cells, style="bold" if row.ours else "cyan" if row.contender == FLOOR else "")
    return table


def show(console: Console, rows: Sequence[Row], where: str = "") -> None:
    first = rows[0]
    console.print(table(f"{first.side}, S = {first.s}, H = {first.heads}", rows, where))
