#include <cmath>
#include <sstream>

#include "bindings/op.h"

namespace mla_fp8::ops {
namespace {

constexpr double kLeastAmaxFloor = 1e-30;  // keeps 448 / amax_floor finite in fp32

QuantizeArgs check_quantize(const Checks& check, const Argument& q_nope, int64_t m_alignment, double amax_floor,
                            bool zero_pad) {
  check_activation(check, q_nope, "[S, H, K]", "K");
  if (m_alignment < 1 || m_alignment > kMaxRows) {
    check.fail("m_alignment", "be in [1, " + std::to_string(kMaxRows) + "]", std::to_string(m_alignment));
  }
  if (!std::isfinite(amax_floor) || amax_floor < kLeastAmaxFloor || !std::isfinite(static_cast<float>(amax_floor))) {
    std::ostringstream got;  // std::to_string would print 1e-31 as 0.000000
    got << amax_floor;
    check.fail("amax_floor", "be finite and at least 1e-30", got.str());
  }
  QuantizeArgs args{};
  args.q_nope = q_nope.view.data;
  copy_strides(args.q_nope_stride, q_nope.view, 2);
  args.s = q_nope.view.sizes[0];
  args.h = q_nope.view.sizes[1];
  args.k = q_nope.view.sizes[2];
  args.m = round_up(args.s, m_alignment);
  args.amax_floor = static_cast<float>(amax_floor);
  args.zero_pad = zero_pad;
  args.in_dtype = q_nope.view.dtype;
  return args;
}

void run_quantize(QuantizeArgs& args, const View& q_nope, const View& val, const View& scale) {
  args.q_val = static_cast<uint8_t*>(val.data);
  copy_strides(args.q_val_stride, val, 2);
  args.q_scale = static_cast<float*>(scale.data);
  copy_strides(args.q_scale_stride, scale, 3);
  run(&cpu::quantize_q_nope, &cuda::quantize_q_nope, q_nope, args);
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_q_nope(const Tensor& q_nope, int64_t m_alignment, double amax_floor,
                                           bool zero_pad) {
  const Checks check("quantize_q_nope");
  const Argument input{"q_nope", view_of(q_nope)};
  QuantizeArgs args = check_quantize(check, input, m_alignment, amax_floor, zero_pad);
  check.inputs({input});
  const int64_t groups = args.k / kScaleGroup, scale_rows = round_up(args.m, kScaleRowsMultiple);
  Tensor val = empty("quantize_q_nope", input.view, Dtype::kE4m3, {args.h, args.m, args.k});
  Tensor scale = empty_strided("quantize_q_nope", input.view, Dtype::kFp32, {args.h, args.m, groups},
                               {scale_rows * groups, 1, scale_rows});
  run_quantize(args, input.view, view_of(val), view_of(scale));
  return {val, scale};
}

void quantize_q_nope_out(const Tensor& q_nope, int64_t m_alignment, double amax_floor, bool zero_pad,
                         const Tensor& val_out, const Tensor& scale_out) {
  const Checks check("quantize_q_nope");
  const Argument input{"q_nope", view_of(q_nope)}, val{"val_out", view_of(val_out)},
      scale{"scale_out", view_of(scale_out)};
  QuantizeArgs args = check_quantize(check, input, m_alignment, amax_floor, zero_pad);
  check.inputs({input});
  check.dtype(val, {Dtype::kE4m3});
  check.shape(val, {args.h, args.m, args.k}, "[H, M, K]");
  check.last_dim_contiguous(val);
  check.dtype(scale, {Dtype::kFp32});
  check.shape(scale, {args.h, args.m, args.k / kScaleGroup}, "[H, M, K/128]");
  check.output(val, {input});
  check.output(scale, {input, val});
  run_quantize(args, input.view, val.view, scale.view);
}

}  // namespace mla_fp8::ops
