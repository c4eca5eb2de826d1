"""What `config.explain` returns, and how it looks: plain text of 80 columns, or with colours on a terminal."""

import io
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mla_fp8._config import Candidate, Device, Op, Problem

PLAIN_WIDTH = 80
OUT_NAMES = {1: "e4m3", 2: "16-bit"}
LEGEND = "(* runs; waves: rounds of CTAs on the SMs; bound: what takes the modelled µs)"
BOUND_NAMES = {"dram_us": "DRAM", "l2_us": "L2", "sm_us": "SM", "mma_us": "MMA"}


@dataclass(frozen=True)
class Explanation:
    """The candidates of a problem in table order, and the one that runs it: None if all are dropped."""

    problem: Problem
    device: Device
    candidates: list[Candidate]
    winner: Candidate | None

    def why(self) -> str:
        """One sentence: why the winner runs it."""
        if self.winner is None:
            return "No tile fits this problem on this device: every one is dropped."
        config = self.winner.config
        if config.grid_x == 0:
            return f"{config.tile.symbol} is selected, and launches nothing: there are no rows."
        others = [other.config for other in self.candidates if other.kept and other is not self.winner]
        if not others:
            return f"{config.tile.symbol} is selected: no other tile fits."
        second = min(others, key=lambda other: other.modelled_us)
        mine, theirs = us(config.modelled_us), us(second.modelled_us)
        if second.modelled_us == config.modelled_us:
            return (
                f"{config.tile.symbol} is selected: it shares the least modelled time, {mine} µs, with "
                f"{second.tile.symbol}; wider accesses, then less shared memory, then table order decide."
            )
        excess = second.modelled_us / config.modelled_us - 1
        return (
            f"{config.tile.symbol} is selected: the least modelled time, {mine} µs; next is "
            f"{second.tile.symbol} with {theirs} µs ({excess:+.1%})."
        )

    def to_dict(self) -> dict[str, Any]:
        """The same values for JSON: problem, device, candidates, winner (a symbol or None), why."""
        return {
            "problem": _as_dict(self.problem),
            "device": _as_dict(self.device),
            "candidates": [_flat(candidate) for candidate in self.candidates],
            "winner": None if self.winner is None else self.winner.config.tile.symbol,
            "why": self.why(),
        }

    def __str__(self) -> str:
        return plain(self)

    def __rich__(self) -> RenderableType:
        return render(self)


def plain(explanation: Explanation) -> str:
    """The table as text, without colours."""
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(explanation)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def render(explanation: Explanation) -> RenderableType:
    """Headline, kept tiles by modelled time, why the winner won, dropped tiles with their reasons."""
    kept = [candidate for candidate in explanation.candidates if candidate.kept]
    dropped = [candidate for candidate in explanation.candidates if not candidate.kept]
    parts: list[RenderableType] = [
        Text(_headline(explanation.problem), style="bold"),
        Text(_limits(explanation.device)),
        Text(),
    ]
    if kept:
        parts += [_kept_table(explanation, kept), Text(LEGEND, style="dim"), Text()]
    parts.append(Text(explanation.why(), style="green" if explanation.winner else "red"))
    if dropped:
        heading = f"Dropped: {len(dropped)} of {len(explanation.candidates)} tiles."
        parts += [Text(), Text(heading, style="bold"), *_dropped(dropped)]
    return Group(*parts)


def us(value: float) -> str:
    """Microseconds in at most 7 characters."""
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.1e}"


def _kept_table(explanation: Explanation, kept: list[Candidate]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("  tile", overflow="fold", vertical="bottom")
    for heading in ("shared\nbytes", "stages", "CTAs\n/SM", "grid", "waves", "bytes\nmoved", "µs", "bound"):
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for candidate in sorted(kept, key=lambda candidate: candidate.config.modelled_us):
        config, tile, wins = candidate.config, candidate.config.tile, candidate is explanation.winner
        table.add_row(
            ("* " if wins else "  ") + _short_name(candidate),
            f"{tile.smem_bytes:,}",
            str(tile.stages),
            str(config.ctas_per_sm),
            _count(config.grid_x),
            _count(config.waves),
            size(config.modelled_bytes),
            us(config.modelled_us),
            _bound(candidate),
            style="bold green" if wins else None,
        )
    return table


def _dropped(candidates: list[Candidate]) -> list[RenderableType]:
    """Reasons, and below each the tiles that it drops."""
    parts: list[RenderableType] = []
    for reason in dict.fromkeys(candidate.reason for candidate in candidates):
        names = ", ".join(_short_name(candidate) for candidate in candidates if candidate.reason == reason)
        for text, indent in ((Text(f"{reason}:"), 2), (Text(names, style="yellow"), 4)):
            parts.append(Padding(text, (0, 0, 0, indent), expand=False))
    return parts


def _short_name(candidate: Candidate) -> str:
    tile = candidate.config.tile
    return tile.symbol.removeprefix(f"{tile.op.name}_")


def _headline(problem: Problem) -> str:
    extents = f"m={problem.m}, k={problem.k}" if problem.op == Op.quantize_q_nope else f"n={problem.n}, k={problem.k}"
    pe = f", pe={problem.pe}" if problem.pe else ""
    elements = f"{OUT_NAMES[problem.out_bytes]} output, {problem.align_bytes}-byte aligned"
    return f"{problem.op.name}: s={problem.s}, heads={problem.heads}, {extents}{pe}, {elements}"


def _limits(device: Device) -> str:
    name = "an H100: " if _as_dict(device) == _as_dict(Device()) else ""
    shared = f"{device.smem_bytes_per_cta:,} bytes of shared memory a CTA"
    return f"modelled on {name}{device.num_sms} SMs, {shared}, {device.dram_gbps:,.0f} GB/s"


def _bound(candidate: Candidate) -> str:
    if candidate.config.grid_x == 0:
        return "-"
    return BOUND_NAMES[max(BOUND_NAMES, key=lambda part: float(getattr(candidate.cost, part)))]


def _count(value: int) -> str:
    return str(value) if value < 100_000 else f"{value:.1e}"


def size(value: float) -> str:
    """Bytes with three digits and their unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} PB"


def _as_dict(struct: Any) -> dict[str, Any]:
    values = {name: getattr(struct, name) for name in struct._fields}
    return {name: value.name if isinstance(value, Op) else value for name, value in values.items()}


def _flat(candidate: Candidate) -> dict[str, Any]:
    config = _as_dict(candidate.config)
    tile = _as_dict(config.pop("tile"))
    tile["ctas_per_sm_limit"] = tile.pop("ctas_per_sm")
    return {**tile, **config, **_as_dict(candidate.cost), "kept": candidate.kept, "reason": candidate.reason}
