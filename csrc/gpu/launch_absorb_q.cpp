#include <algorithm>
#include <atomic>

#include "gpu/cuda.h"
#include "gpu/forced_tile.h"
#include "gpu/launch.h"
#include "kernels/absorb_q.h"
#include "kernels/phases.h"

namespace mla_fp8::cuda {
namespace {

constexpr const char* kOp = "absorb_q";
constexpr int kInBytes = 2;

int align_bytes(const AbsorbQArgs& args, int out_bytes) {
  const int latent = common_alignment(
      {reinterpret_cast<uintptr_t>(args.q_nope), step_bytes(args.s, args.q_nope_stride[0], kInBytes),
       step_bytes(args.h, args.q_nope_stride[1], kInBytes), reinterpret_cast<uintptr_t>(args.q),
       step_bytes(args.s, args.q_stride[0], out_bytes), step_bytes(args.h, args.q_stride[1], out_bytes)});
  if (args.p == 0) return std::max(latent, kInBytes);
  const int pe =
      common_alignment({reinterpret_cast<uintptr_t>(args.q_pe), step_bytes(args.s, args.q_pe_stride[0], kInBytes),
                        step_bytes(args.h, args.q_pe_stride[1], kInBytes)});
  return std::max(std::min(latent, pe), kInBytes);  // the unaligned tiles access single elements
}

}  // namespace

void absorb_q(const AbsorbQArgs& args, int device_index, void* stream) {
  const CurrentDevice device(kOp, device_index);
  if (args.s == 0 || args.h == 0) return;

  Problem problem;
  problem.op = Op::kAbsorbQ;
  problem.s = args.s;
  problem.heads = args.h;
  problem.n = args.r;
  problem.k = args.d;
  problem.pe = args.p;
  problem.out_bytes = args.out_dtype == Dtype::kE4m3 ? 1 : 2;
  problem.align_bytes = align_bytes(args, problem.out_bytes);
  const Config config = choose_config(problem, device.limits());

  absorb_q::Params params{};
  encode_weight_map(kOp, "w_uk", args.w_uk, args.w_uk_stride, args.h, args.r, args.d, *config.tile, &params.w_uk);
  params.q_nope = static_cast<const u16*>(args.q_nope);
  params.q_pe = static_cast<const u16*>(args.q_pe);
  params.w_uk_scale = args.w_uk_scale;
  params.out_scale = args.out_scale;
  params.q = args.q;
  std::copy_n(args.q_nope_stride, 2, params.q_nope_stride);
  std::copy_n(args.q_pe_stride, 2, params.q_pe_stride);
  std::copy_n(args.w_uk_scale_stride, 3, params.w_uk_scale_stride);
  std::copy_n(args.q_stride, 2, params.q_stride);
  params.s = static_cast<i32>(args.s);
  params.h = static_cast<i32>(args.h);
  params.d = static_cast<i32>(args.d);
  params.r = static_cast<i32>(args.r);
  params.pe = static_cast<i32>(args.p);
  params.is_fp16 = args.in_dtype == Dtype::kFp16;
  if (config.tile->phased) {
    static std::atomic<u32> launches{0};
    params.phase_slot = launches.fetch_add(1, std::memory_order_relaxed) % phases::kSlots;
  }
  device.launch(config, &params, stream);
}

}  // namespace mla_fp8::cuda
