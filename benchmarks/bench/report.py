"""Options, progress, tables, and JSON rows with the machine and software behind each."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import mla_fp8

from .measure import FLOOR, Row

HERE = Path(__file__).resolve().parent.parent  # benchmarks/
RESULTS = HERE / "results"
WIDE_COLUMNS = 120  # a terminal narrower than this gets a table without lines and configurations
PLAIN_COLUMNS = 150  # where there is no terminal
Facts = Mapping[str, object]
Rows = Sequence[Mapping[str, Any]]


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parser_of(description: str | None, commit: bool = True) -> argparse.ArgumentParser:
    """With what every benchmark takes: where rows go, and on a GPU which commit they are of."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a row")
    if commit:
        parser.add_argument("--commit", help="for the JSON rows, where git cannot tell")
    return parser


def console_of() -> Console:
    return Console(width=None if sys.stdout.isatty() else PLAIN_COLUMNS)


def needs_gpu(console: Console) -> bool:
    """Whether there is none; then it says so."""
    if not torch.cuda.is_available():
        console.print(f"{command_of(sys.argv[:1])}: needs a CUDA device; benchmarks/cpu.py runs without one")
    return not torch.cuda.is_available()


def progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def output_of(command: Sequence[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    except OSError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def command_of(argv: Sequence[str]) -> str:
    """What was typed: scripts here run by their path, modules of the folders with -m.

    Only options that say what is measured: not where it is written, nor which commit it is.
    """
    file, arguments = Path(argv[0]), argv[1:]
    names = [parent.name for parent in file.parents]
    module = [HERE.name, *reversed(names[: names.index(HERE.name)])] if HERE.name in names else []
    words = ["-m", ".".join([*module, file.stem])] if len(module) > 1 else [f"{HERE.name}/{file.name}"]
    words += [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if not {before, word} & {"--json", "--plot", "--commit"}
    ]
    return shlex.join(["python", *words])


def source_version(git: Sequence[str]) -> str | None:
    """What git says of this checkout; of an installed package, its version."""
    if (HERE.parent / "pyproject.toml").is_file():
        return output_of(git)
    return f"mla_fp8 {importlib.metadata.version('mla_fp8')}"


def environment(commit: str | None = None) -> dict[str, object]:
    """The origin of every JSON row of a GPU; `commit` for a checkout without its history."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    return {
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "driver": output_of(query),
        "torch": torch.__version__,
        "commit": commit or source_version(["git", "describe", "--always", "--dirty", "--exclude=*"]),
        "date": datetime.date.today().isoformat(),
        "command": command_of(sys.argv),
    }


def cpu_environment(threads: int) -> dict[str, object]:
    """The same of a CPU, whose load matters."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "threads": threads,
        "torch": torch.__version__,
        "mla_fp8": mla_fp8.__version__,
        "commit": source_version(["git", "rev-parse", "HEAD"]),
        "date": datetime.date.today().isoformat(),
    }


def again(options: Mapping[str, object]) -> str:
    """The command that measures one table again, with all of its contenders."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", "mla_fp8", "bench", *words])


def origin(facts: Facts) -> str:
    """One line under a table."""
    return ", ".join(f"{key} {facts[key]}" for key in ("gpu", "driver", "torch", "commit", "date"))


def write_json(path: Path, rows: Iterable[Row | Mapping[str, Any]], facts: Facts) -> None:
    lines = [json.dumps({**(asdict(row) if isinstance(row, Row) else row), **facts}) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_whole(path: Path, rows: Iterable[Mapping[str, Any]], facts: Facts) -> None:
    """One object whose "rows" share its other entries."""
    path.write_text(json.dumps({**facts, "rows": list(rows)}, indent=1) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """What either wrote, a row with its origin."""
    text = path.read_text()
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    rows = whole.pop("rows", [{}])
    return [{**whole, **row} for row in rows]


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"


def microseconds(us: float | None) -> str:
    """Three significant digits, and all before the point."""
    return "" if us is None else f"{us:.{2 if us < 10 else 1 if us < 100 else 0}f}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def note(text: str, row: Mapping[str, Any], *keys: str) -> str:
    """Under a table of README or docs: what its numbers are, and where they come from."""
    return f"\n{text}. {', '.join(str(row.get(key)) for key in keys or ('gpu', 'torch', 'commit', 'date'))}.\n"


def grid(title: str | None, *columns: str, left: int = 1, narrow: bool = False, caption: str = "") -> Table:
    """A table whose first `left` columns are words, the others numbers; narrow: without lines."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    if narrow:
        table.box, table.padding, table.pad_edge = None, (0, 2, 0, 0), False
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return table


def finish(
    console: Console, options: argparse.Namespace, rows: Iterable[Row | Mapping[str, Any]], facts: Facts
) -> None:
    """Under the last table: where the rows come from, and their file."""
    console.print(origin(facts))
    if options.json:
        write_json(options.json, rows, facts)


def show(console: Console, rows: Sequence[Row], where: str = "") -> None:
    """One case: a line a contender, the fastest first; last what did not run, with the reason."""
    first, own = rows[0], next((row for row in rows if row.ours and row.us is not None), None)
    narrow = console.width < WIDE_COLUMNS
    columns = ["contender", "µs", "p20", "p80", "GB/s", "% of stream", "over floor", "over ours", "error"]
    if narrow:
        columns = [column.replace("over ", "over\n").replace("% of ", "% of\n") for column in columns]
    table = grid(f"{first.side}, S = {first.s}, H = {first.heads}", *columns, narrow=narrow, caption=where)
    for row in sorted(rows, key=lambda row: row.us if row.us is not None else float("inf")):
        name = row.contender
        if row.us is None:
            table.add_row(f"{name}: {row.status}{': ' if row.reason else ''}{row.reason}", *[""] * 8, style="dim")
            continue
        if row.config and row.contender != FLOOR and not narrow:
            name = f"{name} ({row.config})"
        over_own = row.us / own.us if own is not None and own.us is not None else None
        cells = [microseconds(row.us), microseconds(row.us_p20), microseconds(row.us_p80), number(row.gbps, 0)]
        cells += [number(row.percent_of_stream, 1), number(row.over_floor, 2, "x"), number(over_own, 2, "x")]
        cells += ["" if row.relative_error is None else f"{row.relative_error:.1e}"]
        table.add_row(name, *cells, style="bold" if row.ours else "cyan" if row.contender == FLOOR else "")
    console.print(table)
    if first.reproduce:
        console.print(f"again: {first.reproduce}\n", style="dim", markup=False, highlight=False, soft_wrap=True)
