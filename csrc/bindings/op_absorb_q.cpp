#include "bindings/op.h"

namespace mla_fp8::ops {

Tensor absorb_q(const Tensor* q_out, const Tensor& q_nope, const Tensor& w_uk, const Tensor& w_uk_scale,
                const OptionalTensor& q_pe, const OptionalTensor& out_scale, bool fp8_activations) {
  const Checks check("absorb_q");
  const Arguments inputs = {
      {"q_nope", q_nope}, {"w_uk", w_uk}, {"w_uk_scale", w_uk_scale}, {"out_scale", out_scale}, {"q_pe", q_pe}};
  Product product = take_inputs(check, Op::kAbsorbQ, inputs, {"[S, H, D]", "D", "[H, R, D]", "R", "[H, R/128, D/128]"},
                                fp8_activations);
  const char* form = q_pe.has_value() ? "[S, H, R+P]" : "[S, H, R]";
  const Tensor q = place(check, {"q_out", form, product.out_dtype, q_out},
                         {product.s, product.heads, product.n + product.pe}, inputs);
  set_output(product, view_of(q));
  run(check, inputs, product, &cpu::multiply, &cuda::launch_product);
  return q;
}

}  // namespace mla_fp8::ops
