#include <algorithm>

#include "gpu/cuda.h"
#include "gpu/forced_tile.h"
#include "gpu/launch.h"
#include "kernels/bmm.h"

namespace mla_fp8::cuda {
namespace {

constexpr const char* kOp = "bmm";
constexpr int kOutBytes = 2;

int align_bytes(const BmmArgs& args) {
  return common_alignment({reinterpret_cast<uintptr_t>(args.a), step_bytes(args.batch, args.a_stride[0], 1),
                           step_bytes(args.m, args.a_stride[1], 1), reinterpret_cast<uintptr_t>(args.c),
                           step_bytes(args.batch, args.c_stride[0], kOutBytes),
                           step_bytes(args.m, args.c_stride[1], kOutBytes)});
}

}  // namespace

void bmm(const BmmArgs& args, int device_index, void* stream) {
  const CurrentDevice device(kOp, device_index);
  if (args.m == 0 || args.batch == 0) return;

  Problem problem;
  problem.op = Op::kBmm;
  problem.s = args.m;
  problem.heads = args.batch;
  problem.n = args.n;
  problem.k = args.k;
  problem.in_bytes = 1;
  problem.out_bytes = kOutBytes;
  problem.align_bytes = align_bytes(args);
  const Config config = choose_config(problem, device.limits());

  bmm::Params params{};
  encode_weight_map(kOp, "b", args.b, args.b_stride, args.batch, args.n, args.k, *config.tile, &params.b);
  params.a = args.a;
  params.a_scale = args.a_scale;
  params.b_scale = args.b_scale;
  params.c = args.c;
  std::copy_n(args.a_stride, 2, params.a_stride);
  std::copy_n(args.a_scale_stride, 3, params.a_scale_stride);
  std::copy_n(args.b_scale_stride, 3, params.b_scale_stride);
  std::copy_n(args.c_stride, 2, params.c_stride);
  params.m = static_cast<i32>(args.m);
  params.batch = static_cast<i32>(args.batch);
  params.n = static_cast<i32>(args.n);
  params.k = static_cast<i32>(args.k);
  device.launch(config, &params, stream);
}

}  // namespace mla_fp8::cuda
