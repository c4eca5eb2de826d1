"""A tensor that is a 16-bit weight to whoever multiplies by it, and has FP8 blocks inside."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_map_only

from mla_fp8.errors import require
from mla_fp8.formats import ACTIVATIONS, E4M3, GROUP
from mla_fp8.weights.block_parts import numbers, owned, require_blocks, require_parts
from mla_fp8.weights.block_products import PRODUCTS, multiply, refusal, why_not
from mla_fp8.weights.kept import HOOKS, KEPT, NAME, require_no_write
from mla_fp8.weights.kv_b_proj import contiguous_copy
from mla_fp8.weights.uses import Counts, count_dequantization, counts, reset_counts, warn_of_read

__all__ = ["BlockFp8Weight", "Counts", "counts", "reset_counts"]

NO_STORAGE = f"{NAME} has no 16-bit storage: read .weight and .scale, or make a copy by dequantize()"
aten, ops = torch.ops.aten, torch.ops.mla_fp8
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class BlockFp8Weight(Tensor):
    """A weight [H, K, N] in 16 bits for everybody who reads it, that is stored and multiplied in FP8 blocks.

    torch.bmm(x, W)[h, s, :] = x[h, s, :] · (weight[h] * scale[h])ᵀ, by `absorb_q` or `v_up` with exact activations.

    Args:
        weight: [H, N, K] float8_e4m3fn, as `AbsorbedWeights.w_uk` or `.w_uv`; strides as the ops take them.
        scale: [H, N/128, K/128] float32, any strides; it multiplies.
        dtype: what it says it is and what its products are: torch.bfloat16 or torch.float16.

    Raises:
        ValueError: dtype; type, dtype, rank, extents or strides of weight; type, dtype, shape or device of scale.

    Notes: `torch.bmm(x, W)`, `x.bmm(W)`, `torch.matmul` and `@` run from FP8, also with `out=`, for x [H, S, K] of the
    same dtype whose last dim is contiguous, as `q.transpose(0, 1)` is. The result is the transpose of a token-major
    [S, H, N]. Moves to a device, clone, detach, deepcopy, pickle, torch.save and torch.load, `transpose(1, 2)` (which
    only transposing back makes fast again) and slices of heads keep the parts. All other reads dequantize: they are
    right, cost a 16-bit copy each, are counted (`counts`) and logged once a function; a view of other than heads, as
    `W[0]`, is such a copy, and what is written to it is lost. It has no gradient and no address, and only `update_` and
    `copy_` from another one write to it. Keep it as a plain attribute, a buffer, or a Parameter with
    requires_grad=False, whose `.data` takes only another one. Works in CUDA graphs, inference_mode, threads and
    torch.compile (where Dynamo wants `out` contiguous). To load a saved one, import mla_fp8 first.

    Source: `torch.Tensor._make_wrapper_subclass`; the products are DeepSeek-V2's (arXiv:2405.04434), appendix C.

    Example:
        >>> weights = AbsorbedWeights.from_bf16(torch.randn(2 * 256, 512, dtype=torch.bfloat16), num_heads=2)
        >>> w_uk = BlockFp8Weight(weights.w_uk, weights.w_uk_scale)
        >>> w_uk.shape, w_uk.dtype
        (torch.Size([2, 128, 512]), torch.bfloat16)
        >>> q_nope = torch.randn(3, 2, 128, dtype=torch.bfloat16)
        >>> q = torch.empty(3, 2, 576, dtype=torch.bfloat16)
        >>> q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk, out=q[..., :512].transpose(0, 1))
        >>> torch.equal(q[..., :512], absorb_q(q_nope, weights.w_uk, weights.w_uk_scale))
        True
    """

    weight: Tensor
    scale: Tensor
    _dtype: torch.dtype  # as Tensor's own dtype, which costs a __torch_function__
    _swapped: bool  # logically [H, N, K], which is transposed
    _shape: tuple[int, int, int]
    _strides: tuple[int, int, int]
    _refusal: str | None  # why no product runs from FP8 on this device, if so
    _slow: bool  # no product does
    _absorbs: bool  # a product is absorb_q's, else v_up's
    _make: Any  # that op

    __dlpack_c_exchange_api__ = None  # Tensor's own would hand out a null pointer

    def __new__(cls, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> "BlockFp8Weight":
        """Hold the two tensors as they are, without a copy."""
        allowed = " or ".join(map(str, ACTIVATIONS))
        require(dtype in ACTIVATIONS, NAME, "dtype", f"be {allowed}", dtype)
        require_parts(NAME, weight, scale)
        require_blocks(NAME, weight, scale)
        with torch._C.DisableTorchFunctionSubclass():  # a Parameter's class stays outside
            return cls._of(weight.detach(), scale.detach(), dtype, False)

    @classmethod
    def _of(cls, weight: Tensor, scale: Tensor, dtype: torch.dtype, swapped: bool) -> "BlockFp8Weight":
        """One of parts that have been checked."""
        heads, n, k = weight.shape
        shape, strides = ((heads, n, k), (n * k, k, 1)) if swapped else ((heads, k, n), (n * k, 1, k))
        with torch.inference_mode(False):  # no view of a normal tensor may be an inference tensor
            self: BlockFp8Weight = Tensor._make_wrapper_subclass(
                cls, shape, strides=strides, dtype=dtype, device=weight.device
            )
        torch._C._set_throw_on_mutable_data_ptr(self)  # C++ that asks for the address gets an error, not a null pointer
        self.weight, self.scale, self._dtype, self._swapped = weight, scale, dtype, swapped
        self._shape, self._strides = shape, strides
        self._refusal = refusal(weight.device) if heads else "there is no head"
        self._slow, self._absorbs = swapped or self._refusal is not None, k == GROUP
        self._make = ops.absorb_q.default._op if self._absorbs else ops.v_up.default._op
        return self

    def _parts(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.scale

    def _map(self, function: Callable[[Tensor], Tensor], swap: bool = False) -> "BlockFp8Weight":
        return self._of(function(self.weight), function(self.scale), self._dtype, self._swapped != swap)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """Make a plain tensor of the numbers: value * scale in float32, then rounded to `dtype`, as engines load them.

        Args:
            dtype: of the result; None is the weight's own. float64 has every number whole.

        Returns:
            [H, K, N], of which [H, N, K] is contiguous; transposed weights give [H, N, K].

        Raises: nothing.
        """
        if not is_dynamo_compiling():
            count_dequantization()
        return self._numbers(self._dtype if dtype is None else dtype)

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        rows = numbers(self.weight, self.scale, dtype)
        return rows if self._swapped else rows.transpose(1, 2)

    def update_(self, weight: Tensor, scale: Tensor) -> "BlockFp8Weight":
        """Overwrite the parts in place, for a refit: addresses stay, so CUDA graphs that read them stay valid.

        Args:
            weight: float8_e4m3fn of the shape of `.weight`, any device and strides.
            scale: float32 of the shape of `.scale`, any device and strides.

        Returns: self.
        Raises: ValueError for a type, dtype or shape that differs. Nothing is written then.

        Notes: where the parts are views, the tensors behind them are written.
        """
        where = f"{NAME}.update_"
        require_parts(where, weight, scale)
        for name, mine, new in zip(("weight", "scale"), self._parts(), (weight, scale), strict=True):
            require(new.shape == mine.shape, where, name, f"have shape {list(mine.shape)}", list(new.shape))
        with torch.inference_mode():  # where tensors made inside and outside of it may be written
            self.weight.copy_(weight)
            self.scale.copy_(scale)
        return self

    def data_ptr(self) -> int:
        """Refuse: there is no 16-bit storage.

        Raises: TypeError.
        """
        raise TypeError(NO_STORAGE)

    def __dlpack__(self, **options: Any) -> Any:
        raise TypeError(NO_STORAGE)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        where = f"device={self.weight.device}" + ", transposed" * self._swapped
        return f"{NAME}(shape={list(self._shape)}, dtype={self._dtype}, weight={list(self.weight.shape)}, {where})"

    def __copy__(self) -> "BlockFp8Weight":
        return _as_parameter(self._map(Tensor.detach), isinstance(self, torch.nn.Parameter))

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockFp8Weight":
        """Copy the parts and not the storage behind them, which may be a whole checkpoint tensor."""
        twin = memo.get(id(self))
        if twin is None:
            twin = memo[id(self)] = _as_parameter(self._map(contiguous_copy), isinstance(self, torch.nn.Parameter))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As bytes, for plain pickle cannot load float8; of a view only what it shows."""
        weight, scale = (owned(part) for part in self._parts())
        is_parameter = isinstance(self, torch.nn.Parameter)
        return rebuild, (weight.view(torch.uint8), scale, self._dtype, self._swapped, is_parameter)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["weight", "scale"], (self._dtype, self._swapped)

    @classmethod
    def __tensor_unflatten__(cls, parts: Mapping[str, Tensor], context: Any, size: Any, stride: Any) -> Tensor:
        return cls._of(parts["weight"], parts["scale"], *context)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, for the caches of torch.compile."""
        return str([NAME, self._dtype, self._swapped, *((p.shape, p.stride(), p.device) for p in self._parts())])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Python's calls, for speed: a product answered here costs less than one answered below."""
        if not is_dynamo_compiling():
            if func in PRODUCTS:
                if len(args) == 2 and isinstance(args[1], BlockFp8Weight):
                    out = kwargs.get("out") if kwargs else None
                    if not kwargs or (out is not None and len(kwargs) == 1):
                        result = multiply(args[0], args[1], out)
                        if result is not None:
                            return result
            elif func in HOOKS:
                result = HOOKS[func](*args, **(kwargs or {}))
                if result is not NotImplemented:
                    return result
        with torch._C.DisableTorchFunctionSubclass():  # Tensor's own would give every result this class
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """All calls that come so far: from C++, under modes, in compiled code, and those that are no product."""
        kwargs, reason = kwargs or {}, None
        if func in (aten.bmm.default, aten.bmm.out) and isinstance(args[1], BlockFp8Weight):
            out = kwargs.get("out")
            reason = why_not(args[0], args[1], out)
            if reason is None:
                return multiply(args[0], args[1], out)
        if func in KEPT and isinstance(args[0], BlockFp8Weight):
            result = KEPT[func](func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        require_no_write(func, args, kwargs, BlockFp8Weight)
        if func.has_kernel_for_dispatch_key(COMPOSITE):  # which inference mode hands over whole
            return func.decompose(*args, **kwargs)  # its steps may keep the parts

        def dequantized(weight: BlockFp8Weight) -> Tensor:
            count_dequantization()
            warn_of_read(str(func), list(weight._shape), reason)
            return weight._numbers(weight._dtype)

        with torch.inference_mode(torch.is_inference_mode_enabled() and not func.is_view):  # as in _of
            args, kwargs = tree_map_only(BlockFp8Weight, dequantized, (tuple(args), kwargs))
            return func(*args, **kwargs)


def rebuild(weight: Tensor, scale: Tensor, dtype: torch.dtype, swapped: bool, is_parameter: bool) -> BlockFp8Weight:
    """What a pickled weight is made by; its name is in files."""
    return _as_parameter(BlockFp8Weight._of(weight.view(E4M3), scale, dtype, swapped), is_parameter)


torch.serialization.add_safe_globals([rebuild])


def _as_parameter(weight: BlockFp8Weight, is_parameter: bool) -> BlockFp8Weight:
    if is_parameter:
        weight._is_param = True  # as torch.nn.Parameter does with a subclass
    return weight
