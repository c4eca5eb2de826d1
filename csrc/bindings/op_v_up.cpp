#include "bindings/op.h"

namespace mla_fp8::ops {

static constexpr Forms kForms = {"[S, H, R]", "R", "[H, V, R]", "V", "[H, V/128, R/128]"};

Tensor v_up(const Tensor* v_out, const Tensor& o_latent, const Tensor& w_uv, const Tensor& w_uv_scale,
            const OptionalTensor& out_scale, bool fp8_activations) {
  const Checks check("v_up");
  const Arguments inputs = {
      {"o_latent", o_latent}, {"w_uv", w_uv}, {"w_uv_scale", w_uv_scale}, {"out_scale", out_scale}};
  Product product = take_inputs(check, Op::kVUp, inputs, kForms, fp8_activations);
  const Tensor v =
      place(check, {"v_out", "[S, H, V]", product.out_dtype, v_out}, {product.s, product.heads, product.n}, inputs);
  set_output(product, view_of(v));
  run(check, inputs, product, &cpu::multiply, &cuda::launch_product);
  return v;
}

TwoTensors v_up_quantized(const Tensor* val_out, const Tensor* scale_out, const Tensor& o_latent, const Tensor& w_uv,
                          const Tensor& w_uv_scale, bool fp8_activations) {
  const Checks check("v_up_quantized");
  const Arguments inputs = {{"o_latent", o_latent}, {"w_uv", w_uv}, {"w_uv_scale", w_uv_scale}};
  Product product = take_inputs(check, Op::kVUp, inputs, kForms, fp8_activations);
  if (product.n != kScaleGroup) {
    check.fail("w_uv", "have V = 128, one scale group a head", shape_of(inputs.begin()[1].view));
  }
  product.out_dtype = Dtype::kE4m3;
  const Tensor val =
      place(check, {"val_out", "[S, H*V]", product.out_dtype, val_out}, {product.s, product.heads * product.n}, inputs);
  const Tensor scale = place(check, {"scale_out", "[S, H]", Dtype::kFp32, scale_out}, {product.s, product.heads},
                             inputs, {1, round_up(product.s, kScaleRowsMultiple)});
  const View val_view = view_of(val), scale_view = view_of(scale);
  check.disjoint({"scale_out", scale_view}, {"val_out", val_view});
  product.out = val_view.data;
  // Heads lie side by side.
  product.out_stride[0] = val_view.strides[0], product.out_stride[1] = product.n;
  product.out_row_scale = static_cast<float*>(scale_view.data);
  copy_strides(product.out_row_scale_stride, scale_view, {0, 1});
  run(check, inputs, product, &cpu::multiply, &cuda::launch_product);
  return {val, scale};
}

}  // namespace mla_fp8::ops
