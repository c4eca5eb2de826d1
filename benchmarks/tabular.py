"""The committed records, benchmarks/results/*.json, and what tables of them are made of."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def read(path: Path) -> list[dict[str, Any]]:
    """JSON lines, or one object whose "rows" share its other entries."""
    text = path.read_text()
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    rows = whole.pop("rows", [{}])
    return [{**whole, **row} for row in rows]


def microseconds(us: float) -> str:
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:.0f}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def where_from(row: Mapping[str, Any], *keys: str) -> str:
    return ", ".join(str(row.get(key)) for key in keys or ("gpu", "torch", "commit", "date"))
