"""What `config.explain` returns, and how it looks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mla_fp8._config import Candidate, Device, Op, Problem
from mla_fp8.explain.problem import ONE_TERM
from mla_fp8.text import size, table, wrap

PLAIN_WIDTH = 80
OUT_NAMES = {1: "e4m3", 2: "16-bit"}
ACTIVATIONS = {1: "fp8 activations", 2: "exact activations", 3: "exact fp16 activations"}  # by their terms
LEGEND = "(* runs; waves: tiles that an SM makes in turn; bound: what takes the modelled µs)"
HEADINGS = (
    ("", "shared", "", "CTAs", "", "", "bytes", "", ""),
    ("  tile", "bytes", "stages", "/SM", "grid", "waves", "moved", "µs", "bound"),
)
BOUND_NAMES = {"dram_us": "DRAM", "l2_us": "L2", "sm_us": "SM", "mma_us": "MMA"}


@dataclass(frozen=True)
class Explanation:
    """The candidates of a problem in table order, and the one that runs it: None if all are dropped.

    `modelled_on` says in words which GPU `device` is; empty where it is none that is known.
    """

    problem: Problem
    device: Device
    candidates: list[Candidate]
    winner: Candidate | None
    modelled_on: str = ""

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
        """The same values for JSON: problem, device, modelled_on, candidates, winner (a symbol or None), why."""
        return {
            "problem": _as_dict(self.problem),
            "device": _as_dict(self.device),
            "modelled_on": self.modelled_on,
            "candidates": [_flat(candidate) for candidate in self.candidates],
            "winner": None if self.winner is None else self.winner.config.tile.symbol,
            "why": self.why(),
        }

    def __str__(self) -> str:
        return "\n".join(line for line, _ in lines(self))


def lines(explanation: Explanation, width: int = PLAIN_WIDTH) -> Iterator[tuple[str, str]]:
    """Text and style of each line: headline, kept tiles by modelled time, why the winner won, dropped tiles."""
    considered, winner = explanation.candidates, explanation.winner
    kept = [candidate for candidate in considered if candidate.kept]
    dropped = [candidate for candidate in considered if not candidate.kept]
    yield from _styled("bold", wrap(_headline(explanation.problem), width))
    yield from _styled("", [*wrap(_limits(explanation), width), ""])
    if kept:
        yield from _kept_table(kept, winner, width)
        yield from _styled("dim", [*wrap(LEGEND, width), ""])
    yield from _styled("green" if winner else "red", wrap(explanation.why(), width))
    if dropped:
        yield "", ""
        yield f"Dropped: {len(dropped)} of {len(considered)} tiles.", "bold"
        yield from _dropped(dropped, width)


def us(value: float) -> str:
    """Microseconds in at most 7 characters."""
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.1e}"


def _styled(style: str, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((text, style) for text in texts)


def _kept_table(kept: list[Candidate], winner: Candidate | None, width: int) -> Iterator[tuple[str, str]]:
    ordered = sorted(kept, key=lambda candidate: candidate.config.modelled_us)
    cells = [_cells(candidate, "* " if candidate is winner else "  ") for candidate in ordered]
    styles = ["bold", "bold", *("bold green" if candidate is winner else "" for candidate in ordered)]
    rows = table([*HEADINGS, *cells], align="<" + ">" * (len(HEADINGS[0]) - 1), width=width, flexible=0, gap=" ")
    for style, row in zip(styles, rows, strict=True):
        yield from _styled(style, row)


def _cells(candidate: Candidate, mark: str) -> tuple[str, ...]:
    config, tile = candidate.config, candidate.config.tile
    return (
        mark + _short_name(candidate),
        f"{tile.smem_bytes:,}",
        str(tile.stages),
        str(config.ctas_per_sm),
        _count(config.grid_x),
        _count(config.waves),
        size(config.modelled_bytes),
        us(config.modelled_us),
        _bound(candidate),
    )


def _dropped(candidates: list[Candidate], width: int) -> Iterator[tuple[str, str]]:
    """Reasons, and below each the tiles that it drops."""
    for reason in dict.fromkeys(candidate.reason for candidate in candidates):
        names = ", ".join(_short_name(candidate) for candidate in candidates if candidate.reason == reason)
        yield from _styled("", wrap(f"{reason}:", width, indent="  "))
        yield from _styled("yellow", wrap(names, width, indent="    "))


def _short_name(candidate: Candidate) -> str:
    tile = candidate.config.tile
    return tile.symbol.removeprefix(f"{tile.op.name}_")


def _headline(problem: Problem) -> str:
    extents = f"m={problem.m}, k={problem.k}" if problem.op == Op.quantize_q_nope else f"n={problem.n}, k={problem.k}"
    pe = f", pe={problem.pe}" if problem.pe else ""
    kept = "" if problem.op.name in ONE_TERM else f", {ACTIVATIONS[problem.terms]}"
    elements = f"{OUT_NAMES[problem.out_bytes]} output, {problem.align_bytes}-byte aligned"
    return f"{problem.op.name}: s={problem.s}, heads={problem.heads}, {extents}{pe}{kept}, {elements}"


def _limits(explanation: Explanation) -> str:
    device, name = explanation.device, f"{explanation.modelled_on}: " if explanation.modelled_on else ""
    shared = f"{device.smem_bytes_per_cta:,} bytes of shared memory a CTA"
    return f"modelled on {name}{device.num_sms} SMs, {shared}, {device.dram_gbps:,.0f} GB/s"


def _bound(candidate: Candidate) -> str:
    if candidate.config.grid_x == 0:
        return "-"
    return BOUND_NAMES[max(BOUND_NAMES, key=lambda part: float(getattr(candidate.cost, part)))]


def _count(value: int) -> str:
    return str(value) if value < 100_000 else f"{value:.1e}"


def _as_dict(struct: Any) -> dict[str, Any]:
    values = {name: getattr(struct, name) for name in struct._fields}
    return {name: value.name if isinstance(value, Op) else value for name, value in values.items()}


def _flat(candidate: Candidate) -> dict[str, Any]:
    config = _as_dict(candidate.config)
    tile = _as_dict(config.pop("tile"))
    tile["ctas_per_sm_limit"] = tile.pop("ctas_per_sm")
    return {**tile, **config, **_as_dict(candidate.cost), "kept": candidate.kept, "reason": candidate.reason}
