"""A module whose buffers keep their dtypes, whatever is done to it, and whose copies own their memory."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mla_fp8.formats import E4M3
from mla_fp8.weights.kv_b_proj import contiguous_copy


class Fp8Buffers(nn.Module):
    """Base of `AbsorbedWeights`; its buffers are e4m3 or fp32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fp8Buffers":
        """Moves pass, casts do not: `fn` sees integers, which `.to(dtype)`, `.half()` and the like leave alone."""

        def keep_dtype(buffer: Tensor) -> Tensor:
            bits = buffer.view(torch.uint8 if buffer.dtype == E4M3 else torch.int32)
            moved = fn(bits)
            if moved is bits or moved.dtype != bits.dtype:  # `.type()` casts integers too
                return buffer.to(moved.device)
            return moved.view(buffer.dtype)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Fp8Buffers":
        """Copy the tensors and not the storage behind them, which may be a whole checkpoint tensor."""
        for buffer in self.buffers():
            memo.setdefault(id(buffer), contiguous_copy(buffer))
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse other dtypes, which `copy_` would convert in silence."""
        wrong = [
            f"AbsorbedWeights: {prefix}{name} must be {buffer.dtype}, got {state_dict[prefix + name].dtype}"
            for name, buffer in self.named_buffers()
            if prefix + name in state_dict and state_dict[prefix + name].dtype != buffer.dtype
        ]
        if not wrong:
            super()._load_from_state_dict(state_dict, prefix, *rest)
        error_msgs: list[str] = rest[-1]
        error_msgs.extend(wrong)
