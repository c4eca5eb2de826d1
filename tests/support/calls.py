"""Calls of any op with any arguments, ways to make them, and what their results must be."""

from collections.abc import Callable
from dataclasses import dataclass, field

import strategies
import torch
from cases import ACTIVATIONS, OPS
from helpers import POISON, SUM_ERROR, assert_rounded, assert_same_bits, reference_product
from hypothesis import strategies as st

from mla_fp8 import reference

INF, NAN = float("inf"), float("nan")
FP32_MAX = torch.finfo(torch.float32).max
FP32_SUBNORMAL = 2.0**-149  # a product of scales and a sum are off by half of it, where they are so small
SLEEP_CYCLES = 100_000  # of a GPU: some 60 us, in which a kernel on a wrong stream would have read poison

out_scales = st.sampled_from([None, None, 2.0**-9, 0.01, 1.0, 37.0, 1e-30, 1e30, INF, NAN])


@dataclass
class Call:
    op: str
    arguments: dict
    check: Callable  # the results, of whatever layout -> raises if one is wrong
    options: dict = field(default_factory=dict)
    unwritten_rows: int = 0  # of each result's second dim: the last ones stay as they are

    @property
    def view_names(self) -> list[str]:
        schema = getattr(OPS, self.op).out._schema
        return [argument.name for argument in schema.arguments if argument.name.endswith("_out")]

    def results(self, views=()) -> tuple:
        """What the op returns, or the views that its overload wrote."""
        op = getattr(OPS, self.op)
        if not views:
            returned = op.default(**self.arguments, **self.options)
            return returned if isinstance(returned, tuple) else (returned,)
        op.out(**self.arguments, **self.options, **dict(zip(self.view_names, views, strict=True)))
        return views

    def __repr__(self):
        told = {n: (list(x.shape), x.stride(), x.storage_offset(), x.dtype) for n, x in self.arguments.items()}
        return f"Call({self.op}, {told}, {self.options})"


def on(device, x):
    """The tensor there, with its strides and what lies between its rows."""
    there = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    return there.as_strided(x.shape, x.stride(), x.storage_offset())


def product(x, x_scale, w, w_scale):
    """What `reference_product` gives, the error infinite where a CPU's fp32 sum may overflow."""
    sums, error = reference_product(x, x_scale, w, w_scale)
    if x.is_cuda:
        return sums, error
    if x_scale is None:  # each group times a power of two near this one
        x_scale = reference.split(x)[1]
        error = error + x.shape[-1] * FP32_SUBNORMAL
    else:
        terms = x.double().nan_to_num(0).abs().sum(-1).unsqueeze(-1) * torch.finfo(w.dtype).max + x.shape[-1]
        error = error + terms * FP32_SUBNORMAL
    scales = torch.einsum("shp,hnp->shnp", x_scale.double().abs(), w_scale.double().abs()).nan_to_num(0, 0)
    overflow = (error > FP32_MAX * SUM_ERROR["cpu"]) | (scales.amax(-1) > FP32_MAX).repeat_interleave(128, -1)
    return sums, torch.where(overflow, INF, error)


def rounding_to(dtype, out_scale):
    return (lambda x: x.to(dtype)) if out_scale is None else (lambda x: reference.to_fp8(x, out_scale))


def quantize_q_nope(draw, device):
    x = on(device, draw(strategies.activations()))
    m_alignment = draw(st.sampled_from([1, 3, 4, 64, 128, 256]))
    floor, zero_pad = draw(st.sampled_from([1e-4, 1e-12, 1e-30, 3.0])), draw(st.booleans())

    def check(val, scale):
        rows = val.shape[1] if zero_pad else x.shape[0]
        want_val, want_scale = reference.quantize_q_nope(x, m_alignment, floor)
        assert_same_bits(scale[:, :rows], want_scale[:, :rows], "q_scale")
        assert_same_bits(val[:, :rows], want_val[:, :rows], "q_val")

    options = {"m_alignment": m_alignment, "amax_floor": floor, "zero_pad": zero_pad}
    return Call("quantize_q_nope", {"q_nope": x}, check, options, 0 if zero_pad else -x.shape[0] % m_alignment)


def bmm(draw, device):
    x = on(device, draw(strategies.activations()))
    s, h, k = x.shape
    val, scale = reference.quantize(x)
    a, a_scale = (t.transpose(0, 1).cpu() for t in (val, scale))
    a = on(device, strategies.lay_out(draw, a, step=strategies.WEIGHT_STEP))
    a_scale = on(device, strategies.lay_out(draw, a_scale, free_last=True))
    b, b_scale = (on(device, t) for t in draw(strategies.weights(h, k)))
    m = draw(st.one_of(st.none(), st.integers(0, s)))

    def check(got):
        sums, error = product(val[:m], scale[:m], b, b_scale)
        assert_rounded(got.transpose(0, 1), sums, error, lambda x: x.bfloat16())

    return Call("bmm", {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale}, check, {"m": m})


def one_kernel(draw, device, op, names, rope):
    """absorb_q and v_up: one is the other with q_pe."""
    x = on(device, draw(strategies.activations()))
    s, h, k = x.shape
    w, w_scale = (on(device, t) for t in draw(strategies.weights(h, k)))
    out_scale = draw(out_scales)
    out_scale = None if out_scale is None else torch.tensor(out_scale, device=device)
    arguments = dict(zip(names, (x, w, w_scale), strict=True))
    if rope:
        pe = draw(strategies.rows((s, h, rope), x.dtype))
        arguments["q_pe"] = pe = on(device, strategies.lay_out(draw, pe))
    if out_scale is not None:
        arguments["out_scale"] = out_scale
    activations = draw(st.sampled_from(list(ACTIVATIONS)))

    def check(got):
        sums, error = product(*reference.keep_or_quantize(x, activations), w, w_scale)
        if rope:
            sums, error = torch.cat([sums, pe.double()], -1), torch.nn.functional.pad(error, (0, rope))
        assert_rounded(got, sums, error, rounding_to(x.dtype, out_scale))

    return Call(op, arguments, check, ACTIVATIONS[activations])


def absorb_q(draw, device):
    rope = draw(st.sampled_from([0, 16, 48, 64, 256]))
    return one_kernel(draw, device, "absorb_q", ("q_nope", "w_uk", "w_uk_scale"), rope)


def v_up(draw, device):
    return one_kernel(draw, device, "v_up", ("o_latent", "w_uv", "w_uv_scale"), 0)


def v_up_quantized(draw, device):
    x = on(device, draw(strategies.activations()))
    s, h, r = x.shape
    w, w_scale = (on(device, t) for t in draw(strategies.weights(h, r, n=128)))
    activations = draw(st.sampled_from(list(ACTIVATIONS)))

    def check(val, scale):
        sums, error = product(*reference.keep_or_quantize(x, activations), w, w_scale)
        val_error = error if x.is_cuda else torch.where(scale.unsqueeze(-1).isfinite(), error, INF)
        val_sums = torch.where(scale.unsqueeze(-1).isnan(), NAN, sums)  # a NaN poisons its whole group
        assert_rounded(val.unflatten(1, (h, 128)), val_sums, val_error, rounding_to(None, scale.unsqueeze(-1)), "val")
        floor, fp8_max = (torch.tensor(x, device=device) for x in (reference.AMAX_FLOOR, reference.FP8_MAX))
        amax, amax_error = sums.abs().amax(-1), error.amax(-1)
        assert_rounded(scale, amax, amax_error, lambda x: torch.maximum(x.float(), floor) / fp8_max, "scale")

    arguments = {"o_latent": x, "w_uv": w, "w_uv_scale": w_scale}
    return Call("v_up_quantized", arguments, check, ACTIVATIONS[activations])


MAKERS = {"quantize_q_nope": quantize_q_nope, "bmm": bmm, "absorb_q": absorb_q, "v_up": v_up,
          "v_up_quantized": v_up_quantized}  # fmt: skip


def whole_storage(x):
    """Every byte behind the tensor, whatever its strides."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def run_late_on_a_stream(call, views):
    """On a side stream, behind work that brings the first input only then."""
    first = whole_storage(next(iter(call.arguments.values())))
    values = first.clone()
    first.fill_(POISON)
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        first.copy_(values)
        results = call.results(views)
    here.wait_stream(side)
    return results


def run_in_a_graph(call, views):
    """Captured, and replayed over poison; a first call compiles what a capture may not."""
    call.results(views)
    here, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        graph.capture_begin()
        results = call.results(views)
        graph.capture_end()
    here.wait_stream(side)
    for result in results:
        whole_storage(result).fill_(POISON)
    graph.replay()
    torch.cuda.synchronize()
    return tuple(result.clone() for result in results)  # the graph's memory ends with it


def run_on_threads(call, views, count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call.results(views)
    finally:
        torch.set_num_threads(before)


# Ways to make a call: (call, views) -> its results, which are the views where some are given.
MODES = {
    "cpu": {f"threads_{n}": lambda call, views, n=n: run_on_threads(call, views, n) for n in (1, 2, 4)},
    "cuda": {
        "eager": lambda call, views: call.results(views),
        "stream": run_late_on_a_stream,
        "graph": run_in_a_graph,
    },
}
