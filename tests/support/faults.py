"""Every way to call an op wrongly, as rows: what is spoiled, and the error that must name it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

ACTIVATIONS = [("quantize_q_nope", "q_nope", "K"), ("absorb_q-pe-fp8", "q_nope", "D"), ("v_up-fp8", "o_latent", "R"),
               ("v_up_quantized", "o_latent", "R")]  # fmt: skip
WEIGHTS = [("bmm-m", "b", "a", "N"), ("absorb_q-pe-fp8", "w_uk", "q_nope", "R"), ("v_up-fp8", "w_uv", "o_latent", "V"),
           ("v_up_quantized", "w_uv", "o_latent", "V")]  # fmt: skip
GRAD_RULE = "not require grad, as this op has no backward .*, got requires_grad=True"
BLOCK_RULE = r"a multiple of 128 in \[128, 16384\]"


@dataclass(frozen=True)
class Fault:
    case: str
    argument: str
    name: str
    spoil: Callable  # the argument's value -> the wrong value
    rule: str  # regular expression of what follows "must "
    named: str = ""  # the argument that the error names, where it is not the one spoiled

    def __str__(self):
        return f"{self.case}-{self.argument}-{self.name}"

    def pattern(self) -> str:
        op = self.case.split("-")[0]
        return rf"{op}: {self.named or self.argument} must {self.rule}"


def elsewhere(x):
    return x.cpu() if x.is_cuda else x.to("meta")


def with_grad(x):
    return x.detach().clone().requires_grad_()


def with_last_stride_2(x):
    return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]


def wide(x, extent):
    return x.new_zeros(*x.shape[:-1], extent)


def common(case, argument, first="") -> list[Fault]:
    """What any floating-point tensor can have wrong, but for the first argument's device: the others follow it."""
    faults = [
        Fault(case, argument, "requires_grad", with_grad, GRAD_RULE),
        Fault(case, argument, "result_of_autograd", lambda x: (with_grad(x.float()) * 1).to(x.dtype), GRAD_RULE),
    ]
    if first:
        rule = f"be on the device of {first}, (cpu|cuda:0), got (meta|cpu)"
        faults.append(Fault(case, argument, "on_another_device", elsewhere, rule))
    return faults


def activation(case, argument, extent) -> list[Fault]:
    form = rf"have shape \[S, H, {extent}\], got "
    dtypes = "be bfloat16 or float16, got "
    widths = f"have {extent} {BLOCK_RULE}, got "
    return common(case, argument) + [
        Fault(case, argument, "float32", lambda x: x.float(), dtypes + "float32"),
        Fault(case, argument, "float64", lambda x: x.double(), dtypes + "float64"),
        Fault(case, argument, "float8", lambda x: x.to(torch.float8_e4m3fn), dtypes + "float8_e4m3fn"),
        Fault(case, argument, "integers", lambda x: x.to(torch.int32), dtypes + "int32"),
        Fault(case, argument, "rank_2", lambda x: x[0], form + r"\[3, \d+\]"),
        Fault(case, argument, "rank_4", lambda x: x[None], form + r"\[1, 7, 3, \d+\]"),
        Fault(case, argument, "rank_0", lambda x: x[0, 0, 0], form + r"\[\]"),
        Fault(case, argument, "no_heads", lambda x: x[:, :0], r"have at least one head, got \[7, 0, \d+\]"),
        Fault(case, argument, "too_many_tokens", lambda x: x[:1].expand(2**31, -1, -1),
              r"have at most 2147483647 rows, got \[2147483648, 3, \d+\]"),
        Fault(case, argument, "width_0", lambda x: x[..., :0], widths + "0"),
        Fault(case, argument, "width_100", lambda x: x[..., :100], widths + "100"),
        Fault(case, argument, "width_127", lambda x: x[..., 1:128], widths + "127"),
        Fault(case, argument, "width_16512", lambda x: wide(x, 16512), widths + "16512"),
        Fault(case, argument, "last_stride_2", with_last_stride_2,
              r"have a contiguous last dim, got strides \[\d+, \d+, 2\]"),
        Fault(case, argument, "last_stride_0", lambda x: x[..., :1].expand(x.shape),
              r"have a contiguous last dim, got strides \[\d+, \d+, 0\]"),
    ]  # fmt: skip


def padded_rows(x, by):
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + by)[..., :-by]


def fp8_matrix(case, argument) -> list[Fault]:
    strides = r"have strides that are multiples of 16, but for the last dim, got strides "
    return [
        Fault(case, argument, "bfloat16", lambda x: x.bfloat16(), "be float8_e4m3fn, got bfloat16"),
        Fault(case, argument, "e5m2", lambda x: x.float().to(torch.float8_e5m2), "be float8_e4m3fn, got float8_e5m2"),
        Fault(case, argument, "uint8", lambda x: x.view(torch.uint8), "be float8_e4m3fn, got uint8"),
        Fault(case, argument, "last_stride_2", with_last_stride_2, r"have a contiguous last dim, got strides .*, 2\]"),
        Fault(case, argument, "row_stride", lambda x: padded_rows(x, 8), strides + r"\[\d+, (136|520), 1\]"),
        Fault(case, argument, "batch_stride",
              lambda x: x.new_zeros(3, x[0].numel() + 8)[:, :-8].unflatten(1, x.shape[1:]),
              strides + r"\[\d+, (128|512), 1\]"),
    ]  # fmt: skip


def weight(case, argument, first, extent) -> list[Fault]:
    form = r"have shape \[[HB], [RVN], [DRK]\] = \[3, \*, (128|512)\], got "
    widths = f"have {extent} {BLOCK_RULE}, got "
    return common(case, argument, first) + fp8_matrix(case, argument) + [
        Fault(case, argument, "rank_2", lambda x: x[0], form + r"\[\d+, \d+\]"),
        Fault(case, argument, "fewer_heads", lambda x: x[:2], form + r"\[2, \d+, \d+\]"),
        Fault(case, argument, "more_heads", lambda x: torch.cat([x.view(torch.uint8)] * 2).view(x.dtype),
              form + r"\[6, \d+, \d+\]"),
        Fault(case, argument, "transposed", lambda x: x.mT, form + r"\[3, \d+, \d+\]"),
        Fault(case, argument, "other_depth", lambda x: wide(x, 384), form + r"\[3, \d+, 384\]"),
        Fault(case, argument, "rows_0", lambda x: x[:, :0], widths + "0"),
        Fault(case, argument, "rows_100", lambda x: x[:, :100], widths + "100"),
        Fault(case, argument, "rows_16512", lambda x: x[:, :1].expand(-1, 16512, -1), widths + "16512"),
    ]  # fmt: skip


def scale(case, argument, first, form) -> list[Fault]:
    rule = f"have shape {form}, got "
    return common(case, argument, first) + [
        Fault(case, argument, "bfloat16", lambda x: x.bfloat16(), "be float32, got bfloat16"),
        Fault(case, argument, "float64", lambda x: x.double(), "be float32, got float64"),
        Fault(case, argument, "e8m0", lambda x: x.to(torch.float8_e8m0fnu), "be float32, got .+"),
        Fault(case, argument, "rank_2", lambda x: x[..., 0], rule + r"\[\d+, \d+\]"),
        Fault(case, argument, "rank_0", lambda x: x[0, 0, 0], rule + r"\[\]"),
        Fault(case, argument, "fewer_heads", lambda x: x[:2], rule + r"\[2, \d+, \d+\]"),
        Fault(case, argument, "more_rows", lambda x: torch.cat([x, x], 1), rule + r"\[3, \d+, \d+\]"),
        Fault(case, argument, "more_columns", lambda x: torch.cat([x, x], 2), rule + r"\[3, \d+, \d+\]"),
        Fault(case, argument, "empty", lambda x: x[:0], rule + r"\[0, \d+, \d+\]"),
    ]


def value(case, argument, wrong, rule) -> list[Fault]:
    return [Fault(case, argument, str(w), lambda _, w=w: w, f"{rule}, got {got}") for w, got in wrong]


NAN, INF = float("nan"), float("inf")
PE = "absorb_q-pe-fp8"
FAULTS = [
    *(fault for row in ACTIVATIONS for fault in activation(*row)),
    *(fault for row in WEIGHTS for fault in weight(*row)),
    *scale("bmm-m", "b_scale", "a", r"\[B, N/128, K/128\] = \[3, 4, 1\]"),
    *scale("absorb_q-pe-fp8", "w_uk_scale", "q_nope", r"\[H, R/128, D/128\] = \[3, 4, 1\]"),
    *scale("v_up-fp8", "w_uv_scale", "o_latent", r"\[H, V/128, R/128\] = \[3, 1, 4\]"),
    *scale("v_up_quantized", "w_uv_scale", "o_latent", r"\[H, V/128, R/128\] = \[3, 1, 4\]"),
    *scale("bmm-m", "a_scale", "a", r"\[B, M, K/128\] = \[3, 8, 1\]"),
    *common("bmm-m", "a"), *fp8_matrix("bmm-m", "a"),
    Fault("bmm-m", "a", "rank_2", lambda x: x[0], r"have shape \[B, M, K\], got \[8, 128\]"),
    Fault("bmm-m", "a", "no_batch", lambda x: x[:0], r"have at least one batch, got \[0, 8, 128\]"),
    Fault("bmm-m", "a", "width_64", lambda x: x[..., :64], f"have K {BLOCK_RULE}, got 64"),
    Fault("bmm-m", "a", "width_16512", lambda x: wide(x, 16512), f"have K {BLOCK_RULE}, got 16512"),
    Fault("bmm-m", "a", "fewer_rows", lambda x: x[:, :7], r"have shape \[B, M, K/128\] = \[3, 7, .*", "a_scale"),
    *value("bmm-m", "m", [(-1, -1), (9, 9), (2**40, 2**40)], r"be in \[0, M\] = \[0, 8\]"),
    *value("quantize_q_nope", "m_alignment", [(0, 0), (-1, -1), (2**31, 2**31)], r"be in \[1, 2147483647\]"),
    *value("quantize_q_nope", "amax_floor", [(NAN, "-?nan"), (0.0, "0.*"), (INF, "inf"), (-INF, "-inf"), (-1.0, "-1.*"),
           (1e-31, "1e-31"), (1e39, "1e.?39")], "be finite and at least 1e-30"),
    *common(PE, "q_pe", "q_nope"),
    Fault(PE, "q_pe", "of_another_dtype", lambda x: x.half(), "be bfloat16, got float16"),
    Fault(PE, "q_pe", "rank_2", lambda x: x[:, 0], r"have shape \[S, H, P\] = \[7, 3, \*\], got \[7, 64\]"),
    Fault(PE, "q_pe", "fewer_tokens", lambda x: x[:6], r"have shape \[S, H, P\] = \[7, 3, \*\], got \[6, 3, 64\]"),
    Fault(PE, "q_pe", "one_head", lambda x: x[:, :1], r"have shape \[S, H, P\] = \[7, 3, \*\], got \[7, 1, 64\]"),
    Fault(PE, "q_pe", "width_0", lambda x: x[..., :0], r"have P a multiple of 16 in \[16, 256\], got 0"),
    Fault(PE, "q_pe", "width_40", lambda x: x[..., :40], r"have P a multiple of 16 in \[16, 256\], got 40"),
    Fault(PE, "q_pe", "width_272", lambda x: wide(x, 272), r"have P a multiple of 16 in \[16, 256\], got 272"),
    Fault(PE, "q_pe", "last_stride_2", with_last_stride_2, r"have a contiguous last dim, got strides \[384, 128, 2\]"),
    Fault("absorb_q-pe-fp8", "q_nope", "fewer_tokens", lambda x: x[:5], r"have shape \[S, H, P\] = \[5, .*", "q_pe"),
    Fault("absorb_q-pe-fp8", "q_nope", "heads_first", lambda x: x.transpose(0, 1),
          r"have shape \[S, H, D\] with the 3 heads of w_uk, "
          r"got \[3, 7, 128\], which q_nope.transpose\(0, 1\) would bring to it"),
    Fault("v_up-fp8", "o_latent", "heads_first", lambda x: x.transpose(0, 1),
          r"have shape \[S, H, R\] with the \d+ heads of w_uv, got .*, which o_latent.transpose\(0, 1\) would .*"),
    Fault("absorb_q-pe-fp8", "q_nope", "fewer_heads", lambda x: x[:, :2], r"have shape .* = \[2, .*", "w_uk"),
    Fault("v_up-fp8", "o_latent", "half_the_width", lambda x: x[..., :256], r"have shape .*, 256\], got .*", "w_uv"),
    *(fault for case, first in ((PE, "q_nope"), ("v_up-fp8", "o_latent")) for fault in [
        *common(case, "out_scale", first),
        Fault(case, "out_scale", "float64", lambda x: x.double(), "be float32, got float64"),
        Fault(case, "out_scale", "two_elements", lambda x: x.expand(2), r"have one element, got shape \[2\]"),
        Fault(case, "out_scale", "no_elements", lambda x: x[:0], r"have one element, got shape \[0\]"),
    ]),
    Fault("v_up_quantized", "w_uv", "two_groups", lambda x: torch.cat([x.view(torch.uint8)] * 2, 1).view(x.dtype),
          r"have shape \[H, V/128, R/128\] = \[3, 2, 4\], got \[3, 1, 4\]", "w_uv_scale"),
]  # fmt: skip
