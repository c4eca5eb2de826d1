#include "bindings/op.h"

namespace mla_fp8::ops {
namespace {

BmmArgs check_bmm(const Checks& check, const Argument& a, const Argument& a_scale, const Argument& b,
                  const Argument& b_scale, std::optional<int64_t> m) {
  check.rank(a, 3, "[B, M, K]");
  check.extent(a.name, "K", a.view.sizes[2], kScaleGroup, kMaxExtent);
  check.fp8_matrix(a);
  const int64_t batch = a.view.sizes[0], rows = a.view.sizes[1], k = a.view.sizes[2];
  if (batch < 1) check.fail(a.name, "have at least one batch", shape_of(a.view));
  check.dtype(a_scale, {Dtype::kFp32});
  check.shape(a_scale, {batch, rows, k / kScaleGroup}, "[B, M, K/128]");
  check_weight(check, b, b_scale, batch, k, "[B, N, K]", "N", "[B, N/128, K/128]");
  const int64_t used_rows = m.value_or(rows);
  if (used_rows < 0 || used_rows > rows) {
    check.fail("m", "be in [0, M] = [0, " + std::to_string(rows) + "]", std::to_string(used_rows));
  }
  check.inputs({a, a_scale, b, b_scale});
  BmmArgs args{};
  args.a = static_cast<const uint8_t*>(a.view.data);
  copy_strides(args.a_stride, a.view, 2);
  args.a_scale = static_cast<const float*>(a_scale.view.data);
  copy_strides(args.a_scale_stride, a_scale.view, 3);
  args.b = static_cast<const uint8_t*>(b.view.data);
  copy_strides(args.b_stride, b.view, 2);
  args.b_scale = static_cast<const float*>(b_scale.view.data);
  copy_strides(args.b_scale_stride, b_scale.view, 3);
  args.batch = batch;
  args.m = used_rows;
  args.n = b.view.sizes[1];
  args.k = k;
  return args;
}

void run_bmm(BmmArgs& args, const View& a, const View& c) {
  args.c = c.data;
  copy_strides(args.c_stride, c, 2);
  run(&cpu::bmm, &cuda::bmm, a, args);
}

}  // namespace

Tensor bmm(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale, std::optional<int64_t> m) {
  const Argument input{"a", view_of(a)};
  BmmArgs args = check_bmm(Checks("bmm"), input, {"a_scale", view_of(a_scale)}, {"b", view_of(b)},
                           {"b_scale", view_of(b_scale)}, m);
  Tensor c = empty("bmm", input.view, Dtype::kBf16, {args.batch, args.m, args.n});
  run_bmm(args, input.view, view_of(c));
  return c;
}

void bmm_out(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale, std::optional<int64_t> m,
             const Tensor& c_out) {
  const Checks check("bmm");
  const Argument input{"a", view_of(a)}, input_scale{"a_scale", view_of(a_scale)}, weight{"b", view_of(b)},
      weight_scale{"b_scale", view_of(b_scale)}, c{"c_out", view_of(c_out)};
  BmmArgs args = check_bmm(check, input, input_scale, weight, weight_scale, m);
  check.dtype(c, {Dtype::kBf16});
  check.shape(c, {args.batch, args.m, args.n}, "[B, m, N]");
  check.last_dim_contiguous(c);
  check.output(c, {input, input_scale, weight, weight_scale});
  run_bmm(args, input.view, c.view);
}

}  // namespace mla_fp8::ops
