"""`explain()`: what `select_config`, which every CUDA launch asks, makes of a problem, and why."""

from mla_fp8._config import Device, candidates, select_config
from mla_fp8.explain.device import modelled
from mla_fp8.explain.explanation import Explanation
from mla_fp8.explain.problem import DEFAULT_M_ALIGNMENT, problem_for


def explain(
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
    device: Device | int | None = None,
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
        activations: "exact" or "fp8", as absorb_q, v_up and v_up_quantized take it; of no account for the others.
        out_dtype: torch dtype or its name. Default: bfloat16, or float8_e4m3fn where the op writes nothing else. With
            float16 the activations are fp16 too, else bf16.
        align_bytes: largest power of 2, at most 16, that divides every pointer and stride but the weights', in bytes.
        device: limits and speeds, or the index of a CUDA device, as in cuda:0. Default: torch's current CUDA device
            where the kernels run on it, else an H100 SXM.

    Returns:
        An Explanation: `print` shows the table, `to_dict()` holds its values.

    Raises:
        ValueError: op; out_dtype; m_alignment; activations; extents that no kernel supports, each with its rule.
        RuntimeError: as `device_limits`, for an index.

    Notes: launches nothing and needs no GPU. A call of the op on the modelled device chooses the same tile; another
    GPU's limits and speeds may lead to another one.

    Source: docs/configuration.md.

    Example:
        >>> explain("absorb_q", s=17, heads=128).winner.kept
        True
    """
    problem = problem_for(
        op,
        s,
        heads,
        n=n,
        k=k,
        pe=pe,
        m_alignment=m_alignment,
        activations=activations,
        out_dtype=out_dtype,
        align_bytes=align_bytes,
    )
    limits, modelled_on = modelled(device)
    considered = candidates(problem, limits)
    chosen = None
    if any(candidate.kept for candidate in considered):
        symbol = select_config(problem, limits).tile.symbol
        chosen = next(candidate for candidate in considered if candidate.config.tile.symbol == symbol)
    return Explanation(problem, limits, considered, chosen, modelled_on)
