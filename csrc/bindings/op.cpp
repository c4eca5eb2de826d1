#include "bindings/op.h"

namespace mla_fp8::ops {

void check_activation(const Checks& check, const Argument& x, const char* form, const char* extent) {
  check.rank(x, 3, form);
  check.dtype(x, {Dtype::kBf16, Dtype::kFp16});
  if (x.view.sizes[0] > kMaxRows) {
    check.fail(x.name, text("have at most ", kMaxRows, " rows"), shape_of(x.view));
  }
  if (x.view.sizes[1] < 1) check.fail(x.name, "have at least one head", shape_of(x.view));
  check.extent(x.name, extent, x.view.sizes[2], kScaleGroup, kMaxExtent);
  check.last_dim_contiguous(x);
}

void take_weight(const Checks& check, const Argument& w, const Argument& w_scale, const Forms& forms,
                 Product& product) {
  check.shape(w, {product.heads, kAny, product.k}, forms.w);
  product.n = w.view.sizes[1];
  check.extent(w.name, forms.n, product.n, kScaleGroup, kMaxExtent);
  check.fp8_matrix(w);
  check.dtype(w_scale, {Dtype::kFp32});
  check.shape(w_scale, {product.heads, product.n / kScaleGroup, product.k / kScaleGroup}, forms.w_scale);
  product.w = static_cast<const u8*>(w.view.data);
  copy_strides(product.w_stride, w.view, {0, 1});
  product.w_scale = static_cast<const float*>(w_scale.view.data);
  copy_strides(product.w_scale_stride, w_scale.view, {0, 1, 2});
}

Product take_inputs(const Checks& check, Op op, Arguments inputs, const Forms& forms, bool fp8_activations) {
  const Argument missing{"", View{}};
  const auto input = [&](size_t i) -> const Argument& { return i < inputs.size() ? inputs.begin()[i] : missing; };
  const Argument &x = input(0), &out_scale = input(3), &q_pe = input(4);
  check_activation(check, x, forms.x, forms.k);
  Product product{};
  product.op = op;
  product.x = x.view.data;
  copy_strides(product.x_stride, x.view, {0, 1});
  product.s = x.view.sizes[0], product.heads = x.view.sizes[1], product.k = x.view.sizes[2];
  const View& w = input(1).view;
  if (w.dim == 3 && w.sizes[0] != product.heads && w.sizes[0] == product.s) {
    check.fail(x.name, text("have shape ", forms.x, " with the ", w.sizes[0], " heads of ", input(1).name),
               text(shape_of(x.view), ", which ", x.name, ".transpose(0, 1) would bring to it"));
  }
  take_weight(check, input(1), input(2), forms, product);
  if (q_pe.view) {
    check.dtype(q_pe, {x.view.dtype});
    check.shape(q_pe, {product.s, product.heads, kAny}, "[S, H, P]");
    check.extent(q_pe.name, "P", q_pe.view.sizes[2], kPeStep, kMaxPe);
    check.last_dim_contiguous(q_pe);
    product.q_pe = q_pe.view.data;
    copy_strides(product.q_pe_stride, q_pe.view, {0, 1});
    product.pe = q_pe.view.sizes[2];
  }
  check.out_scale(out_scale);
  check.inputs(inputs);
  product.out_scale = static_cast<const float*>(out_scale.view.data);
  product.x_dtype = x.view.dtype;
  product.terms = fp8_activations ? 1 : product.x_dtype == Dtype::kFp16 ? kMostTerms : kBf16Terms;
  product.out_dtype = out_scale.view ? Dtype::kE4m3 : product.x_dtype;
  return product;
}

Tensor place(const Checks& check, const Result& result, Extents sizes, Arguments inputs, Extents strides) {
  if (result.given == nullptr) return empty(check.op(), inputs.begin()->view, result.dtype, sizes, strides);
  const Argument out{result.name, *result.given};
  check.dtype(out, {result.dtype});
  check.shape(out, sizes, result.form);
  if (strides.size() == 0) check.last_dim_contiguous(out);
  check.output(out, inputs);
  return *result.given;
}

void set_output(Product& product, const View& out, const int (&dims)[2]) {
  product.out = out.data;
  copy_strides(product.out_stride, out, dims);
}

}  // namespace mla_fp8::ops
