"""The weights of MLA's two absorbed products, cut once from a checkpoint's kv_b_proj and kept in FP8."""

from pathlib import Path

import torch
from torch import Tensor

from mla_fp8.errors import require
from mla_fp8.formats import AMAX_FLOOR, E4M3, GROUP, dequantize_blocks
from mla_fp8.weights.ambient import on_the_cpu
from mla_fp8.weights.checkpoint import KV_B_PROJ, load_heads, read_kv_b_proj
from mla_fp8.weights.file import BUFFERS, read_weights
from mla_fp8.weights.fp8_buffers import Fp8Buffers
from mla_fp8.weights.kv_b_proj import HeadDims, cut_heads, quantize_blocks, require_head_dim


class AbsorbedWeights(Fp8Buffers):
    """W_UK and W_UV of one MLA layer in FP8, in the layouts that `absorb_q` and `v_up` read.

    Args:
        w_uk: [H, R, D] float8_e4m3fn, W_UK of each head transposed.
        w_uk_scale: [H, R/128, D/128] float32, one scale a 128x128 block; it multiplies.
        w_uv: [H, V, R] float8_e4m3fn, often a view of the checkpoint (head stride (D+V)*R).
        w_uv_scale: [H, V/128, R/128] float32.

    Raises:
        ValueError: dtypes, ranks, devices that differ, extents that disagree, dims that are no multiple of 128.

    Notes: the four are buffers. Moving the module to a device moves them; casting it (`.half()`, `.to(torch.bfloat16)`)
    leaves their dtypes alone. Of a view `torch.save` writes the whole tensor behind it, and safetensors refuses it: use
    copy.deepcopy(weights), which owns its memory, or copy_w_uv=True. For DDP over gloo see docs/integrations.md.

    Source: DeepSeek-V2 paper (arXiv:2405.04434), section 2.1.2: W_UK is absorbed into W_Q, W_UV into W_O.

    Example:
        >>> weight, scale = torch.zeros(16 * 256, 512).to(torch.float8_e4m3fn), torch.ones(16 * 2, 4)
        >>> AbsorbedWeights.from_kv_b_proj(weight, scale, num_heads=16).w_uk.shape
        torch.Size([16, 512, 128])
    """

    w_uk: Tensor
    w_uk_scale: Tensor
    w_uv: Tensor
    w_uv_scale: Tensor

    def __init__(self, w_uk: Tensor, w_uk_scale: Tensor, w_uv: Tensor, w_uv_scale: Tensor) -> None:
        """Hold four tensors as they are."""
        super().__init__()
        where, tensors = "AbsorbedWeights", (w_uk, w_uk_scale, w_uv, w_uv_scale)
        for name, tensor in zip(BUFFERS, tensors, strict=True):
            dtype = torch.float32 if name.endswith("scale") else E4M3
            require(tensor.dtype == dtype, where, name, f"be {dtype}", tensor.dtype)
            require(tensor.dim() == 3, where, name, "have 3 dimensions", list(tensor.shape))
            require(tensor.device == w_uk.device, where, name, f"be on {w_uk.device} as w_uk is", tensor.device)
        (heads, lora, nope), v_dim = w_uk.shape, w_uv.shape[1]
        require(heads >= 1, where, "w_uk", "have at least one head", list(w_uk.shape))
        for argument, dim in (("kv_lora_rank", lora), ("qk_nope_head_dim", nope), ("v_head_dim", v_dim)):
            require_head_dim(where, argument, dim)
        shapes = ((lora, nope), (lora // GROUP, nope // GROUP), (v_dim, lora), (v_dim // GROUP, lora // GROUP))
        for name, tensor, shape in zip(BUFFERS, tensors, shapes, strict=True):
            require(tensor.shape == (heads, *shape), where, name, f"be {[heads, *shape]}", list(tensor.shape))
            self.register_buffer(name, tensor.detach())
            self._buffers[name] = tensor.detach()  # accelerate's init_empty_weights makes register_buffer move it

    @classmethod
    def from_kv_b_proj(
        cls,
        weight: Tensor,
        weight_scale_inv: Tensor,
        num_heads: int,
        *,
        qk_nope_head_dim: int = 128,
        v_head_dim: int = 128,
        scale_fmt: str | None = None,
        copy_w_uv: bool = False,
    ) -> "AbsorbedWeights":
        """Cut kv_b_proj into heads, without loss: `w_uk` is a transposed copy, `w_uv` a view of `weight`.

        Args:
            weight: [H*(D+V), R] float8_e4m3fn; row h*(D+V)+i is W_UK[h] for i < D, else W_UV[h].
            weight_scale_inv: [H*(D+V)/128, R/128], more extents of 1 allowed; float32, bfloat16, float16, or
                float8_e8m0fnu, or, with scale_fmt="ue8m0", uint8 holding exponents: 2^(e-127), where 255 is NaN and
                refused. It multiplies, as its name does not say; compressed-tensors calls it `weight_scale`.
            num_heads: H, of this rank.
            qk_nope_head_dim, v_head_dim: D and V, multiples of 128.
            scale_fmt: `quantization_config.scale_fmt` of the checkpoint; read for uint8 scales only.
            copy_w_uv: False: `w_uv` is a view, which keeps the whole storage of `weight` alive and sees writes to it
                (copied all the same where `weight` is not aligned to 16 bytes). True: it owns its memory.

        Returns:
            the weights of [H, ...] heads in float8_e4m3fn and float32, on `weight`'s device.

        Raises:
            ValueError: num_heads; a head dim that is no multiple of 128; dtype, rank or extents of weight, then of its
                scale; tensors on two devices; a scale that is not finite.
        """
        dims = HeadDims(num_heads, qk_nope_head_dim, v_head_dim)
        return cls(*cut_heads("from_kv_b_proj", weight, weight_scale_inv, dims, scale_fmt, copy_w_uv))

    @classmethod
    def from_bf16(
        cls,
        weight: Tensor,
        num_heads: int,
        *,
        qk_nope_head_dim: int = 128,
        v_head_dim: int = 128,
        amax_floor: float = AMAX_FLOOR,
    ) -> "AbsorbedWeights":
        """Quantize kv_b_proj in 128x128 blocks: scale = max(amax, amax_floor) / 448, value = e4m3(w * (1/scale)).

        Args:
            weight: [H*(D+V), R] bfloat16, float16 or float32, finite.
            num_heads, qk_nope_head_dim, v_head_dim: H, D, V as in `from_kv_b_proj`.
            amax_floor: a block's largest magnitude counts as at least this; finite, >= 1e-30.

        Returns:
            weights that own their memory, on `weight`'s device; for normal data their relative error is 2.6e-2.

        Raises:
            ValueError: as `from_kv_b_proj`; an amax_floor out of range; a weight that is not finite.
        """
        dims = HeadDims(num_heads, qk_nope_head_dim, v_head_dim)
        value, scale = quantize_blocks("from_bf16", weight, dims, amax_floor)
        return cls(*cut_heads("from_bf16", value, scale, dims, None, copy_w_uv=True))

    @classmethod
    @on_the_cpu()
    def from_safetensors(
        cls,
        directory: str | Path,
        layer: int,
        tp_rank: int = 0,
        tp_size: int = 1,
        *,
        copy_w_uv: bool = False,
        quantize_bf16: bool = False,
        name: str = KV_B_PROJ,
    ) -> "AbsorbedWeights":
        """Load one layer of a DeepSeek-format checkpoint: only this rank's rows are read, through a memory map.

        Args:
            directory: holds config.json (head dims, block size, scale_fmt) and model.safetensors.index.json or
                model.safetensors; files may be links, as in the hub's cache.
            layer: index of the decoder layer.
            tp_rank, tp_size: this rank takes heads [tp_rank*C, (tp_rank+1)*C), C = ceil(H/tp_size); from H on, zeros.
            copy_w_uv: as in `from_kv_b_proj`; here the view is of the mapped file, which must not be rewritten in place
                as long as the view lives. Moving to a GPU, or a deepcopy, ends it.
            quantize_bf16: allow a checkpoint without FP8 weights, quantized as by `from_bf16`.
            name: the tensors' name before `.weight` and `.weight_scale_inv` or `.weight_scale`, with `{layer}` in it;
                the default also finds it in `language_model`.

        Returns:
            the weights of this rank, on the CPU, whatever default device, dtype or mode of torch is on.

        Raises:
            ValueError: layer, tp_rank or tp_size out of range; a missing or broken file; a missing tensor; scales of
                other than 128x128 blocks; weights that are not FP8, without quantize_bf16; and as `from_kv_b_proj`.
        """
        return cls(*load_heads(read_kv_b_proj(directory, layer, tp_rank, tp_size, name), quantize_bf16, copy_w_uv))

    @classmethod
    @on_the_cpu()
    def load(cls, path: str | Path) -> "AbsorbedWeights":
        """Read one of the files that `python -m mla_fp8 convert` writes.

        Args:
            path: a safetensors file of w_uk, w_uk_scale, w_uv and w_uv_scale.

        Returns:
            the weights, on the CPU, mapped from the file, whatever default device or mode of torch is on.

        Raises:
            ValueError: a missing or broken file; one that holds other tensors; and as the constructor.
        """
        return cls(*read_weights(path))

    def update_(
        self,
        source: "AbsorbedWeights | Tensor",
        weight_scale_inv: Tensor | None = None,
        *,
        scale_fmt: str | None = None,
    ) -> "AbsorbedWeights":
        """Overwrite the weights in place, for a refit: every address stays, so CUDA graphs that read them stay valid.

        Args:
            source: other AbsorbedWeights; or this rank's kv_b_proj weight, FP8 with its `weight_scale_inv` or, without
                one, bfloat16, float16 or float32, quantized as by `from_bf16`. Any device.
            weight_scale_inv, scale_fmt: as in `from_kv_b_proj`.

        Returns: self.
        Raises: ValueError as the constructors, and for extents that differ from these. Nothing is written then.

        Notes: where `w_uv` is a view of the first checkpoint tensor, that tensor is written too.
        """
        where, dims = "update_", HeadDims(self.num_heads, self.qk_nope_head_dim, self.v_head_dim)
        if isinstance(source, Tensor):
            if weight_scale_inv is None:
                source, weight_scale_inv = quantize_blocks(where, source, dims, AMAX_FLOOR)
            source = AbsorbedWeights(*cut_heads(where, source, weight_scale_inv, dims, scale_fmt, copy_w_uv=False))
        rule = "be AbsorbedWeights or a Tensor"
        require(isinstance(source, AbsorbedWeights), where, "source", rule, type(source).__name__)
        shapes = [list(buffer.shape) for buffer in (self.w_uk, self.w_uv)]
        got = [list(buffer.shape) for buffer in (source.w_uk, source.w_uv)]
        require(shapes == got, where, "source", f"make w_uk and w_uv of {shapes}", got)
        with torch.inference_mode():  # where tensors made inside and outside of it may be written
            for name in BUFFERS:
                getattr(self, name).copy_(getattr(source, name))
        return self

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """The weights as numbers: value * scale, rounded once, as the checkpoint dequantizes.

        Returns: W_UK [H, D, R] and W_UV [H, V, R] float32, new tensors on the weights' device.
        Raises: nothing.
        """
        w_uk, w_uv = dequantize_blocks(self.w_uk, self.w_uk_scale), dequantize_blocks(self.w_uv, self.w_uv_scale)
        return w_uk.float().mT.contiguous(), w_uv.float()

    @property
    def num_heads(self) -> int:
        """H, of this rank."""
        return self.w_uk.shape[0]

    @property
    def kv_lora_rank(self) -> int:
        """R."""
        return self.w_uk.shape[1]

    @property
    def qk_nope_head_dim(self) -> int:
        """D."""
        return self.w_uk.shape[2]

    @property
    def v_head_dim(self) -> int:
        """V."""
        return self.w_uv.shape[1]

    @property
    def memory_bytes(self) -> int:
        """Bytes of the four tensors (a view of the checkpoint keeps more alive)."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        """Dims, bytes and device, for the module's repr."""
        dims = ("num_heads", "qk_nope_head_dim", "kv_lora_rank", "v_head_dim", "memory_bytes")
        return ", ".join(f"{dim}={getattr(self, dim)}" for dim in dims) + f", device={self.w_uk.device}"
