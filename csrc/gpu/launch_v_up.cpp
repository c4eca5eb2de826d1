#include <algorithm>

#include "gpu/cuda.h"
#include "gpu/forced_tile.h"
#include "gpu/launch.h"
#include "kernels/v_up.h"

namespace mla_fp8::cuda {
namespace {

constexpr int kInBytes = 2;

int align_bytes(const VUpArgs& args, int out_bytes) {
  const int common = common_alignment(
      {reinterpret_cast<uintptr_t>(args.o_latent), step_bytes(args.s, args.o_latent_stride[0], kInBytes),
       step_bytes(args.h, args.o_latent_stride[1], kInBytes), reinterpret_cast<uintptr_t>(args.v),
       step_bytes(args.s, args.v_stride[0], out_bytes), step_bytes(args.h, args.v_stride[1], out_bytes)});
  return std::max(common, kInBytes);  // the unaligned tiles access single elements
}

}  // namespace

void v_up(const VUpArgs& args, int device_index, void* stream) {
  const char* op = args.v_scale == nullptr ? "v_up" : "v_up_quantized";
  const CurrentDevice device(op, device_index);
  if (args.s == 0 || args.h == 0) return;

  Problem problem;
  problem.op = Op::kVUp;
  problem.s = args.s;
  problem.heads = args.h;
  problem.n = args.v_dim;
  problem.k = args.r;
  problem.out_bytes = args.out_dtype == Dtype::kE4m3 ? 1 : 2;
  problem.align_bytes = align_bytes(args, problem.out_bytes);
  const Config config = choose_config(problem, device.limits());

  v_up::Params params{};
  encode_weight_map(op, "w_uv", args.w_uv, args.w_uv_stride, args.h, args.v_dim, args.r, *config.tile, &params.w_uv);
  params.o_latent = static_cast<const u16*>(args.o_latent);
  params.w_uv_scale = args.w_uv_scale;
  params.out_scale = args.out_scale;
  params.v = args.v;
  params.v_scale = args.v_scale;
  std::copy_n(args.o_latent_stride, 2, params.o_latent_stride);
  std::copy_n(args.w_uv_scale_stride, 3, params.w_uv_scale_stride);
  std::copy_n(args.v_stride, 2, params.v_stride);
  std::copy_n(args.v_scale_stride, 2, params.v_scale_stride);
  params.s = static_cast<i32>(args.s);
  params.h = static_cast<i32>(args.h);
  params.r = static_cast<i32>(args.r);
  params.v_dim = static_cast<i32>(args.v_dim);
  params.is_fp16 = args.in_dtype == Dtype::kFp16;
  device.launch(config, &params, stream);
}

}  // namespace mla_fp8::cuda
