"""The ops on DTensors: heads sharded over the ranks of a mesh, each rank working on its own."""

from collections.abc import Callable
from itertools import compress
from typing import Any

import torch

from mla_fp8.errors import require

__all__ = ["register_shardings"]

Split = tuple[list[int | None], list[int | None]]

# Op -> the dims of its outputs and of its tensor arguments that count heads (the batch for bmm), and tokens. None: such
# a tensor is whole on every rank. No "tokens" where the op pads them, or reads only the first of them.
_HEADS: dict[str, Split] = {
    "quantize_q_nope": ([0, 0], [1]),
    "bmm": ([0], [0, 0, 0, 0]),
    "absorb_q": ([1], [1, 0, 0, 1, None]),
    "v_up": ([1], [1, 0, 0, None]),
    "v_up_quantized": ([1, 1], [1, 0, 0]),
}
_TOKENS: dict[str, Split] = {
    "absorb_q": ([0], [0, None, None, 0, None]),
    "v_up": ([0], [0, None, None, None]),
    "v_up_quantized": ([0, 0], [0, None, None]),
}


def register_shardings() -> None:
    """Tell DTensor how the ops run on sharded tensors: by head or by token, with no communication inside an op.

    By head, a rank of T holds heads [rank * H/T, (rank + 1) * H/T) of activations and weights and makes those of the
    output; by token, every rank holds all weights. DTensor brings other placements to one of these first, or to whole
    tensors.

        op                by head: inputs -> outputs                                       by token
        quantize_q_nope   q_nope Shard(1) -> q_val, q_scale Shard(0)                       (it pads tokens)
        bmm               a, a_scale, b, b_scale Shard(0) -> Shard(0)                      (it may read only some)
        absorb_q          q_nope, q_pe Shard(1), w_uk, w_uk_scale Shard(0) -> q Shard(1)   q_nope, q_pe, q Shard(0)
        v_up              o_latent Shard(1), w_uv, w_uv_scale Shard(0) -> v Shard(1)       o_latent, v Shard(0)
        v_up_quantized    the same -> v_val, v_scale Shard(1)                              o_latent, outputs Shard(0)

    `out_scale` is replicated; `activations` changes nothing here.

    Args:
        none. A second call changes nothing.

    Returns:
        nothing; from then on the ops take DTensors, eager and compiled.

    Raises:
        ValueError: later, from v_up_quantized, where the ranks that share the heads do not divide them: DTensor would
            cut v_val [S, H*128] inside a head.

    Notes: `distribute_tensor` of float8 weights fails over gloo; `DTensor.from_local` needs no communication, and
    `AbsorbedWeights.from_safetensors(directory, layer, tp_rank, tp_size)` reads a rank's heads only. The overloads
    that write (`out=`) take plain tensors: give them the `to_local()` of each.

    Source: DeepSeek-V3 paper (arXiv:2412.19437), section 3.4: attention with tensor and data parallelism.

    Example:
        >>> register_shardings()
        >>> w_uk, w_uk_scale = (DTensor.from_local(w, mesh, [Shard(0)]) for w in (weights.w_uk, weights.w_uk_scale))
        >>> q_nope = DTensor.from_local(torch.randn(3, 2, 128, dtype=torch.bfloat16), mesh, [Shard(1)])
        >>> absorb_q(q_nope, w_uk, w_uk_scale).placements
        (Shard(dim=1),)
    """
    from torch.distributed.tensor.experimental import register_sharding  # here, for it takes long to import

    for op in _HEADS:
        register_sharding(getattr(torch.ops.mla_fp8, op).default)(_shardings(op))


def _shardings(op: str) -> Callable[..., list[tuple[list[Any], list[Any]]]]:
    """What DTensor calls with an op's arguments, tensors as specs: placements of outputs and inputs on one mesh dim."""
    from torch.distributed.tensor import Replicate, Shard

    def place(dim: int | None) -> Any:
        return Replicate() if dim is None else Shard(dim)

    def acceptable(*arguments: Any, **options: Any) -> list[tuple[list[Any], list[Any]]]:
        if op == "v_up_quantized":
            _require_whole_heads(*arguments)
        (heads_out, heads_in), tokens = _HEADS[op], _TOKENS.get(op)
        splits: list[Split] = [([None] * len(heads_out), [None] * len(heads_in)), (heads_out, heads_in)]
        splits += [tokens] if tokens else []  # of splits that cost the same DTensor takes the first
        given = [argument is not None for argument in arguments]
        return [([place(dim) for dim in outputs], [place(dim) for dim in compress(inputs, given)])
                for outputs, inputs in splits]  # fmt: skip

    return acceptable


def _require_whole_heads(o_latent: Any, w_uv: Any, w_uv_scale: Any) -> None:
    """v_val's columns are cut between heads only if the ranks divide the heads."""
    mesh, ranks = o_latent.mesh, 1
    for dim in range(mesh.ndim):
        if o_latent.placements[dim].is_shard(1) or w_uv.placements[dim].is_shard(0):
            ranks *= mesh.size(dim)
    rule = f"have a multiple of {ranks} heads, as {ranks} ranks share them"
    require(o_latent.shape[1] % ranks == 0, "v_up_quantized", "o_latent", rule, list(o_latent.shape))
