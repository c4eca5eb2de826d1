"""Which compiled tile runs a problem, and why: `explain()` over the `select_config` that every CUDA launch asks."""

import contextlib
import ctypes
from collections.abc import Iterator

from mla_fp8._config import Candidate, Config, Device, Op, Problem, Tile, candidates, select_config, tiles
from mla_fp8.explanation import Explanation

__all__ = [
    "Candidate",
    "Config",
    "Device",
    "Explanation",
    "Op",
    "Problem",
    "Tile",
    "candidates",
    "explain",
    "forced_tile",
    "problem_for",
    "select_config",
    "tiles",
]

OUT_BYTES = {"bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
DEFAULT_M_ALIGNMENT = 256  # of quantize_q_nope
# DeepSeek-V3's extents of a head, by op: n, k.
DEFAULT_EXTENTS = {
    "quantize_q_nope": (128, 128),
    "bmm": (512, 128),
    "absorb_q": (512, 128),
    "v_up": (128, 512),
    "v_up_quantized": (128, 512),
}


@contextlib.contextmanager
def forced_tile(symbol: str) -> Iterator[None]:
    """Make this thread's CUDA calls of the tile's op use that tile, to compare it with others.

    Args:
        symbol: of a line of csrc/kernels/sm90/tiles.h, as `tiles()` lists them, e.g. "absorb_q_shared512".

    Returns:
        a context manager; at its end the thread chooses tiles again.

    Raises:
        ValueError: no such tile is compiled.
        RuntimeError: later, from a call that the tile cannot run, with the reason.

    Notes: the bits of a result do not depend on the tile. CPU calls have no tiles.

    Example:
        >>> with forced_tile("absorb_q_shared512"):
        ...     pass
    """
    from mla_fp8 import _native  # torch is not needed to explain

    force = ctypes.CDLL(str(_native.LIBRARY)).mla_fp8_force_tile
    if force(symbol.encode()):
        raise ValueError(f"forced_tile: symbol must be one of {', '.join(t.symbol for t in tiles())}, got {symbol!r}")
    try:
        yield
    finally:
        force(None)


def problem_for(
    op: str,
    s: int,
    heads: int,
    *,
    n: int | None = None,
    k: int | None = None,
    pe: int = 0,
    m_alignment: int = DEFAULT_M_ALIGNMENT,
    out_dtype: object = None,
    align_bytes: int = 16,
) -> Problem:
    """The Problem that a call of `op` becomes.

    Args:
        op, s, heads, n, k, pe, m_alignment, out_dtype, align_bytes: as for `explain`.

    Returns:
        a Problem; what no kernel supports is said only by `select_config` and `candidates`.

    Raises:
        ValueError: op; out_dtype; m_alignment.

    Example:
        >>> problem_for("absorb_q", s=17, heads=128).k
        128
    """
    if op not in DEFAULT_EXTENTS:
        raise ValueError(f"explain: op must be one of {', '.join(DEFAULT_EXTENTS)}, got {op!r}")
    only_fp8 = op in ("quantize_q_nope", "v_up_quantized")
    dtype = str(out_dtype or ("float8_e4m3fn" if only_fp8 else "bfloat16")).removeprefix("torch.")
    if dtype not in OUT_BYTES:
        raise ValueError(f"explain: out_dtype must be one of {', '.join(OUT_BYTES)}, got {dtype!r}")
    if op == "v_up_quantized" and dtype != "float8_e4m3fn":
        raise ValueError(f"explain: out_dtype must be float8_e4m3fn for v_up_quantized, got {dtype!r}")
    if m_alignment < 1:
        raise ValueError(f"explain: m_alignment must be at least 1, got {m_alignment}")
    default_n, default_k = DEFAULT_EXTENTS[op]
    return Problem(
        op=Op.__members__[op.removesuffix("_quantized")],
        s=s,
        heads=heads,
        n=default_n if n is None else n,
        k=default_k if k is None else k,
        pe=pe,
        m=-(-s // m_alignment) * m_alignment if op == "quantize_q_nope" else 0,
        in_bytes=1 if op == "bmm" else 2,
        out_bytes=OUT_BYTES[dtype],
        align_bytes=align_bytes,
    )


def explain(
    op: str,
    s: int,
    heads: int,
    *,
    n: int | None = None,
    k: int | None = None,
    pe: int = 0,
    m_alignment: int = DEFAULT_M_ALIGNMENT,
    out_dtype: object = None,
    align_bytes: int = 16,
    device: Device | None = None,
) -> Explanation:
    """Every compiled tile of an op: what it would cost on this problem, which one runs it, and why the others do not.

    Args:
        op: quantize_q_nope, bmm, absorb_q, v_up or v_up_quantized.
        s: tokens; rows of `a` for bmm.
        heads: heads; the batch for bmm.
        n: columns of the product: R for absorb_q, V for v_up. Default: DeepSeek-V3's.
        k: its summed extent: D for absorb_q, R for v_up. Default: DeepSeek-V3's.
        pe: columns of q_pe that absorb_q appends, 0 without q_pe.
        m_alignment: rows that quantize_q_nope pads to.
        out_dtype: torch dtype or its name. Default: bfloat16, or float8_e4m3fn where the op writes nothing else.
        align_bytes: largest power of 2, at most 16, that divides every pointer and stride but the weights', in bytes.
        device: limits and speeds. Default: an H100 SXM.

    Returns:
        An Explanation: `print` shows the table, `to_dict()` holds its values.

    Raises:
        ValueError: op; out_dtype; m_alignment; extents that no kernel supports, each with its rule.

    Notes: pure and needs no GPU; a call of the op chooses the same tile.

    Source: docs/configuration.md.

    Example:
        >>> explain("absorb_q", s=17, heads=128).winner.kept
        True
    """
    problem = problem_for(
        op, s, heads, n=n, k=k, pe=pe, m_alignment=m_alignment, out_dtype=out_dtype, align_bytes=align_bytes
    )
    limits = device or Device()
    considered = candidates(problem, limits)
    chosen = None
    if any(candidate.kept for candidate in considered):
        symbol = select_config(problem, limits).tile.symbol
        chosen = next(candidate for candidate in considered if candidate.config.tile.symbol == symbol)
    return Explanation(problem, limits, considered, chosen)
