#include "bindings/op.h"

namespace mla_fp8::ops {
namespace {

constexpr int64_t kQuantizedVDim = kScaleGroup;  // v_up_quantized: a head is one scale group

VUpArgs check_v_up(const Checks& check, const Argument& o_latent, const Argument& w_uv, const Argument& w_uv_scale,
                   const Argument& out_scale) {
  check_activation(check, o_latent, "[S, H, R]", "R");
  const int64_t h = o_latent.view.sizes[1], r = o_latent.view.sizes[2];
  check_weight(check, w_uv, w_uv_scale, h, r, "[H, V, R]", "V", "[H, V/128, R/128]");
  check.out_scale(out_scale);
  check.inputs({o_latent, w_uv, w_uv_scale, out_scale});
  VUpArgs args{};
  args.o_latent = o_latent.view.data;
  copy_strides(args.o_latent_stride, o_latent.view, 2);
  args.w_uv = static_cast<const uint8_t*>(w_uv.view.data);
  copy_strides(args.w_uv_stride, w_uv.view, 2);
  args.w_uv_scale = static_cast<const float*>(w_uv_scale.view.data);
  copy_strides(args.w_uv_scale_stride, w_uv_scale.view, 3);
  args.out_scale = static_cast<const float*>(out_scale.view.data);
  args.s = o_latent.view.sizes[0];
  args.h = h;
  args.r = r;
  args.v_dim = w_uv.view.sizes[1];
  args.in_dtype = o_latent.view.dtype;
  args.out_dtype = out_scale.view ? Dtype::kE4m3 : args.in_dtype;
  return args;
}

void run_v_up(VUpArgs& args, const View& o_latent, const View& v) {
  args.v = v.data;
  copy_strides(args.v_stride, v, 2);
  run(&cpu::v_up, &cuda::v_up, o_latent, args);
}

VUpArgs check_v_up_quantized(const Checks& check, const Argument& o_latent, const Argument& w_uv,
                             const Argument& w_uv_scale) {
  VUpArgs args = check_v_up(check, o_latent, w_uv, w_uv_scale, {"out_scale", View{}});
  if (args.v_dim != kQuantizedVDim) {
    check.fail(w_uv.name, "have V = 128, one scale group a head", shape_of(w_uv.view));
  }
  args.out_dtype = Dtype::kE4m3;
  return args;
}

void run_v_up_quantized(VUpArgs& args, const View& o_latent, const View& val, const View& scale) {
  args.v = val.data;
  args.v_stride[0] = val.strides[0];
  args.v_stride[1] = args.v_dim;  // [S, H*V]: heads lie side by side
  args.v_scale = static_cast<float*>(scale.data);
  copy_strides(args.v_scale_stride, scale, 2);
  run(&cpu::v_up, &cuda::v_up, o_latent, args);
}

}  // namespace

Tensor v_up(const Tensor& o_latent, const Tensor& w_uv, const Tensor& w_uv_scale, const OptionalTensor& out_scale) {
  const Argument input{"o_latent", view_of(o_latent)};
  VUpArgs args = check_v_up(Checks("v_up"), input, {"w_uv", view_of(w_uv)}, {"w_uv_scale", view_of(w_uv_scale)},
                            {"out_scale", view_of_optional(out_scale)});
  Tensor v = empty("v_up", input.view, args.out_dtype, {args.s, args.h, args.v_dim});
  run_v_up(args, input.view, view_of(v));
  return v;
}

void v_up_out(const Tensor& o_latent, const Tensor& w_uv, const Tensor& w_uv_scale, const OptionalTensor& out_scale,
              const Tensor& v_out) {
  const Checks check("v_up");
  const Argument input{"o_latent", view_of(o_latent)}, weight{"w_uv", view_of(w_uv)},
      weight_scale{"w_uv_scale", view_of(w_uv_scale)}, scale{"out_scale", view_of_optional(out_scale)},
      v{"v_out", view_of(v_out)};
  VUpArgs args = check_v_up(check, input, weight, weight_scale, scale);
  check.dtype(v, {args.out_dtype});
  check.shape(v, {args.s, args.h, args.v_dim}, "[S, H, V]");
  check.last_dim_contiguous(v);
  check.output(v, {input, weight, weight_scale, scale});
  run_v_up(args, input.view, v.view);
}

std::tuple<Tensor, Tensor> v_up_quantized(const Tensor& o_latent, const Tensor& w_uv, const Tensor& w_uv_scale) {
  const Argument input{"o_latent", view_of(o_latent)};
  VUpArgs args = check_v_up_quantized(Checks("v_up_quantized"), input, {"w_uv", view_of(w_uv)},
                                      {"w_uv_scale", view_of(w_uv_scale)});
  const int64_t width = args.h * args.v_dim;
  Tensor val = empty("v_up_quantized", input.view, Dtype::kE4m3, {args.s, width});
  Tensor scale = empty_strided("v_up_quantized", input.view, Dtype::kFp32, {args.s, args.h},
                               {1, round_up(args.s, kScaleRowsMultiple)});
  run_v_up_quantized(args, input.view, view_of(val), view_of(scale));
  return {val, scale};
}

void v_up_quantized_out(const Tensor& o_latent, const Tensor& w_uv, const Tensor& w_uv_scale, const Tensor& val_out,
                        const Tensor& scale_out) {
  const Checks check("v_up_quantized");
  const Argument input{"o_latent", view_of(o_latent)}, weight{"w_uv", view_of(w_uv)},
      weight_scale{"w_uv_scale", view_of(w_uv_scale)}, val{"val_out", view_of(val_out)},
      scale{"scale_out", view_of(scale_out)};
  VUpArgs args = check_v_up_quantized(check, input, weight, weight_scale);
  check.dtype(val, {Dtype::kE4m3});
  check.shape(val, {args.s, args.h * args.v_dim}, "[S, H*V]");
  check.last_dim_contiguous(val);
  check.dtype(scale, {Dtype::kFp32});
  check.shape(scale, {args.s, args.h}, "[S, H]");
  check.output(val, {input, weight, weight_scale});
  check.output(scale, {input, weight, weight_scale, val});
  run_v_up_quantized(args, input.view, val.view, scale.view);
}

}  // namespace mla_fp8::ops
