"""How an Explanation looks: plain text of 80 columns, or a rich renderable that has colours on a terminal."""

import io
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mla_fp8._config import Candidate, Device, Op, Problem

if TYPE_CHECKING:
    from mla_fp8.config import Explanation

PLAIN_WIDTH = 80
OUT_NAMES = {1: "e4m3", 2: "16-bit"}
BOUND_NAMES = {"dram_us": "DRAM", "l2_us": "L2", "sm_us": "SM", "mma_us": "MMA"}


def plain(explanation: "Explanation") -> str:
    """The table as text, without colours."""
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(explanation)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def render(explanation: "Explanation") -> RenderableType:
    """Headline, kept tiles by modelled time, why the winner won, dropped tiles with their reasons."""
    kept = [candidate for candidate in explanation.candidates if candidate.kept]
    dropped = [candidate for candidate in explanation.candidates if not candidate.kept]
    parts: list[RenderableType] = [
        Text(_headline(explanation.problem), style="bold"),
        Text(_limits(explanation.device)),
        Text(),
    ]
    if kept:
        parts += [_kept_table(explanation, kept), Text()]
    parts.append(Text(explanation.why(), style="green" if explanation.winner else "red"))
    if dropped:
        heading = f"Dropped: {len(dropped)} of {len(explanation.candidates)} tiles."
        parts += [Text(), Text(heading, style="bold"), _dropped_table(dropped)]
    return Group(*parts)


def us(value: float) -> str:
    """Microseconds in at most 7 characters."""
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.1e}"


def _kept_table(explanation: "Explanation", kept: list[Candidate]) -> Table:
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


def _dropped_table(dropped: list[Candidate]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="yellow")
    table.add_column()
    for candidate in dropped:
        table.add_row("  " + _short_name(candidate), candidate.reason)
    return table


def _short_name(candidate: Candidate) -> str:
    tile = candidate.config.tile
    return tile.symbol.removeprefix(f"{tile.op.name}_")


def _headline(problem: Problem) -> str:
    extents = f"m={problem.m}, k={problem.k}" if problem.op == Op.quantize_q_nope else f"n={problem.n}, k={problem.k}"
    pe = f", pe={problem.pe}" if problem.pe else ""
    elements = f"{OUT_NAMES[problem.out_bytes]} output, {problem.align_bytes}-byte aligned"
    return f"{problem.op.name}: s={problem.s}, heads={problem.heads}, {extents}{pe}, {elements}"


def _limits(device: Device) -> str:
    shared = f"{device.smem_bytes_per_cta:,} bytes of shared memory a CTA"
    return f"on {device.num_sms} SMs, {shared}, {device.dram_gbps:,.0f} GB/s"


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
