#include "bindings/op.h"

namespace mla_fp8::ops {

Tensor bmm(const Tensor* c_out, const Tensor& a_, const Tensor& a_scale_, const Tensor& b, const Tensor& b_scale,
           std::optional<int64_t> m) {
  const Checks check("bmm");
  const Arguments inputs = {{"a", a_}, {"a_scale", a_scale_}, {"b", b}, {"b_scale", b_scale}};
  const Argument &a = inputs.begin()[0], &a_scale = inputs.begin()[1];
  check.rank(a, 3, "[B, M, K]");
  check.extent(a.name, "K", a.view.sizes[2], kScaleGroup, kMaxExtent);
  check.fp8_matrix(a);
  Product product{};
  product.op = Op::kBmm;
  const int64_t rows = a.view.sizes[1];
  product.s = m.value_or(rows), product.heads = a.view.sizes[0], product.k = a.view.sizes[2];
  if (product.heads < 1) check.fail(a.name, "have at least one batch", shape_of(a.view));
  check.dtype(a_scale, {Dtype::kFp32});
  check.shape(a_scale, {product.heads, rows, product.k / kScaleGroup}, "[B, M, K/128]");
  take_weight(check, inputs.begin()[2], inputs.begin()[3], {"[B, M, K]", "K", "[B, N, K]", "N", "[B, N/128, K/128]"},
              product);
  if (product.s < 0 || product.s > rows) {
    check.fail("m", text("be in [0, M] = [0, ", rows, "]"), text(product.s));
  }
  check.inputs(inputs);
  product.x = a.view.data;
  copy_strides(product.x_stride, a.view, {1, 0});
  product.x_scale = static_cast<const float*>(a_scale.view.data);
  copy_strides(product.x_scale_stride, a_scale.view, {1, 0, 2});
  product.x_dtype = Dtype::kE4m3;
  product.terms = 1;
  product.out_dtype = Dtype::kBf16;
  const Tensor c =
      place(check, {"c_out", "[B, m, N]", product.out_dtype, c_out}, {product.heads, product.s, product.n}, inputs);
  set_output(product, view_of(c), {1, 0});
  run(check, inputs, product, &cpu::multiply, &cuda::launch_product);
  return c;
}

}  // namespace mla_fp8::ops
