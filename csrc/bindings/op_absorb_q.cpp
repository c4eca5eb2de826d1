#include "bindings/op.h"

namespace mla_fp8::ops {
namespace {

AbsorbQArgs check_absorb_q(const Checks& check, const Argument& q_nope, const Argument& w_uk,
                           const Argument& w_uk_scale, const Argument& q_pe, const Argument& out_scale) {
  check_activation(check, q_nope, "[S, H, D]", "D");
  const int64_t s = q_nope.view.sizes[0], h = q_nope.view.sizes[1], d = q_nope.view.sizes[2];
  check_weight(check, w_uk, w_uk_scale, h, d, "[H, R, D]", "R", "[H, R/128, D/128]");
  if (q_pe.view) {
    check.dtype(q_pe, {q_nope.view.dtype});
    check.shape(q_pe, {s, h, kAny}, "[S, H, P]");
    check.extent(q_pe.name, "P", q_pe.view.sizes[2], kPeStep, kMaxPe);
    check.last_dim_contiguous(q_pe);
  }
  check.out_scale(out_scale);
  check.inputs({q_nope, w_uk, w_uk_scale, q_pe, out_scale});
  AbsorbQArgs args{};
  args.q_nope = q_nope.view.data;
  copy_strides(args.q_nope_stride, q_nope.view, 2);
  args.w_uk = static_cast<const uint8_t*>(w_uk.view.data);
  copy_strides(args.w_uk_stride, w_uk.view, 2);
  args.w_uk_scale = static_cast<const float*>(w_uk_scale.view.data);
  copy_strides(args.w_uk_scale_stride, w_uk_scale.view, 3);
  if (q_pe.view) {
    args.q_pe = q_pe.view.data;
    copy_strides(args.q_pe_stride, q_pe.view, 2);
    args.p = q_pe.view.sizes[2];
  }
  args.out_scale = static_cast<const float*>(out_scale.view.data);
  args.s = s;
  args.h = h;
  args.d = d;
  args.r = w_uk.view.sizes[1];
  args.in_dtype = q_nope.view.dtype;
  args.out_dtype = out_scale.view ? Dtype::kE4m3 : args.in_dtype;
  return args;
}

void run_absorb_q(AbsorbQArgs& args, const View& q_nope, const View& q) {
  args.q = q.data;
  copy_strides(args.q_stride, q, 2);
  run(&cpu::absorb_q, &cuda::absorb_q, q_nope, args);
}

}  // namespace

Tensor absorb_q(const Tensor& q_nope, const Tensor& w_uk, const Tensor& w_uk_scale, const OptionalTensor& q_pe,
                const OptionalTensor& out_scale) {
  const Argument input{"q_nope", view_of(q_nope)};
  AbsorbQArgs args =
      check_absorb_q(Checks("absorb_q"), input, {"w_uk", view_of(w_uk)}, {"w_uk_scale", view_of(w_uk_scale)},
                     {"q_pe", view_of_optional(q_pe)}, {"out_scale", view_of_optional(out_scale)});
  const int64_t width = args.r + args.p;
  Tensor q = empty("absorb_q", input.view, args.out_dtype, {args.s, args.h, width});
  run_absorb_q(args, input.view, view_of(q));
  return q;
}

void absorb_q_out(const Tensor& q_nope, const Tensor& w_uk, const Tensor& w_uk_scale, const OptionalTensor& q_pe,
                  const OptionalTensor& out_scale, const Tensor& q_out) {
  const Checks check("absorb_q");
  const Argument input{"q_nope", view_of(q_nope)}, weight{"w_uk", view_of(w_uk)},
      weight_scale{"w_uk_scale", view_of(w_uk_scale)}, rope{"q_pe", view_of_optional(q_pe)},
      scale{"out_scale", view_of_optional(out_scale)}, q{"q_out", view_of(q_out)};
  AbsorbQArgs args = check_absorb_q(check, input, weight, weight_scale, rope, scale);
  check.dtype(q, {args.out_dtype});
  check.shape(q, {args.s, args.h, args.r + args.p}, rope.view ? "[S, H, R+P]" : "[S, H, R]");
  check.last_dim_contiguous(q);
  check.output(q, {input, weight, weight_scale, rope, scale});
  run_absorb_q(args, input.view, q.view);
}

}  // namespace mla_fp8::ops
