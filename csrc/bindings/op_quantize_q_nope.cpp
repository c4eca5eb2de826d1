#include <cmath>

#include "bindings/op.h"

namespace mla_fp8::ops {

static constexpr double kLeastAmaxFloor = 1e-30;  // keeps 448 / amax_floor finite in fp32

TwoTensors quantize_q_nope(const Tensor* val_out, const Tensor* scale_out, const Tensor& q_nope, int64_t m_alignment,
                           double amax_floor, bool zero_pad) {
  const Checks check("quantize_q_nope");
  const Arguments inputs = {{"q_nope", q_nope}};
  const Argument& rows = *inputs.begin();
  check_activation(check, rows, "[S, H, K]", "K");
  if (m_alignment < 1 || m_alignment > kMaxRows) {
    check.fail("m_alignment", text("be in [1, ", kMaxRows, "]"), text(m_alignment));
  }
  if (!std::isfinite(amax_floor) || amax_floor < kLeastAmaxFloor || !std::isfinite(static_cast<float>(amax_floor))) {
    check.fail("amax_floor", "be finite and at least 1e-30", text(amax_floor));
  }
  check.inputs(inputs);
  QuantizeArgs args{};
  args.q_nope = rows.view.data;
  copy_strides(args.q_nope_stride, rows.view, {0, 1});
  args.s = rows.view.sizes[0], args.h = rows.view.sizes[1], args.k = rows.view.sizes[2];
  args.m = round_up(args.s, m_alignment);
  args.amax_floor = static_cast<float>(amax_floor);
  args.zero_pad = zero_pad;
  args.in_dtype = rows.view.dtype;

  const i64 groups = args.k / kScaleGroup, scale_rows = round_up(args.m, kScaleRowsMultiple);
  const Tensor val = place(check, {"val_out", "[H, M, K]", Dtype::kE4m3, val_out}, {args.h, args.m, args.k}, inputs);
  const Tensor scale = place(check, {"scale_out", "[H, M, K/128]", Dtype::kFp32, scale_out}, {args.h, args.m, groups},
                             inputs, {scale_rows * groups, 1, scale_rows});
  const View val_view = view_of(val), scale_view = view_of(scale);
  check.disjoint({"scale_out", scale_view}, {"val_out", val_view});
  args.q_val = static_cast<u8*>(val_view.data);
  copy_strides(args.q_val_stride, val_view, {0, 1});
  args.q_scale = static_cast<float*>(scale_view.data);
  copy_strides(args.q_scale_stride, scale_view, {0, 1, 2});
  run(check, inputs, args, &cpu::quantize_q_nope, &cuda::launch_quantize_q_nope);
  return {val, scale};
}

}  // namespace mla_fp8::ops
