"""The Problem that a call of an op becomes, as csrc/config sees it."""

import torch

from mla_fp8._config import Op, Problem
from mla_fp8.formats import EXACT_TERMS, MODES

OUT_BYTES = {"bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
ONE_TERM = ("quantize_q_nope", "bmm")  # they take no activations=
DEFAULT_M_ALIGNMENT = 256  # of quantize_q_nope
# DeepSeek-V3's extents of a head, by op: n, k.
DEFAULT_EXTENTS = {
    "quantize_q_nope": (128, 128),
    "bmm": (512, 128),
    "absorb_q": (512, 128),
    "v_up": (128, 512),
    "v_up_quantized": (128, 512),
}


def problem_for(
    op: str,
    s: int,
    heads: int,
    *,
    n: int | None = None,
    k: int | None = None,
    pe: int = 0,
    m_alignment: int = DEFAULT_M_ALIGNMENT,
    activations: str = "exact",
    out_dtype: object = None,
    align_bytes: int = 16,
) -> Problem:
    """The Problem that a call of `op` becomes.

    Args:
        op, s, heads, n, k, pe, m_alignment, activations, out_dtype, align_bytes: as for `explain`.

    Returns:
        a Problem; what no kernel supports is said only by `select_config` and `candidates`.

    Raises:
        ValueError: op; out_dtype; m_alignment; activations.

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
    if activations not in MODES:
        raise ValueError(f"explain: activations must be 'exact' or 'fp8', got {activations!r}")
    exact = activations == "exact" and op not in ONE_TERM
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
        terms=EXACT_TERMS.get(getattr(torch, dtype), EXACT_TERMS[torch.bfloat16]) if exact else 1,
        out_bytes=OUT_BYTES[dtype],
        align_bytes=align_bytes,
    )
