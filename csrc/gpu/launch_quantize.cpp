#include <algorithm>

#include "config/cost.h"
#include "gpu/driver.h"
#include "gpu/launch.h"
#include "kernels/quantize_q_nope.h"

namespace mla_fp8::cuda {
namespace {

namespace kernel = mla_fp8::quantize_q_nope;

// The 16-byte tiles also store 8 bytes at a time; where q_val does not allow that, the unaligned
// tile serves.
int align_bytes(const QuantizeArgs& args, i64 rows) {
  const int in = alignment(args.q_nope, args.q_nope_stride, args.s, args.h, kernel::kElementBytes);
  const int out = alignment(args.q_val, args.q_val_stride, args.h, rows, 1);
  return out >= kernel::kStoreBytes ? in : std::min(in, kernel::kElementBytes);
}

}  // namespace

void launch_quantize_q_nope(const QuantizeArgs& args, int device_index, void* stream) {
  const CurrentDevice device("quantize_q_nope", device_index);
  const i64 rows = args.zero_pad ? args.m : args.s;
  if (rows == 0 || args.h == 0) return;

  Problem problem;
  problem.op = Op::kQuantizeQNope;
  problem.s = args.s;
  problem.m = rows;
  problem.heads = args.h;
  problem.k = args.k;
  problem.out_bytes = 1;
  problem.align_bytes = align_bytes(args, rows);
  const Config config = choose_config(problem, device.limits());

  kernel::Params params{};
  params.q_nope = args.q_nope;
  std::copy_n(args.q_nope_stride, 2, params.q_nope_stride);
  params.q_val = args.q_val;
  std::copy_n(args.q_val_stride, 2, params.q_val_stride);
  params.q_scale = args.q_scale;
  std::copy_n(args.q_scale_stride, 3, params.q_scale_stride);
  params.s = args.s;
  params.rows = rows;
  params.tiles = config.tiles;
  params.groups = static_cast<u32>(args.k / kScaleGroup);
  params.columns = static_cast<u64>(args.h) * params.groups;
  params.amax_floor = args.amax_floor;
  params.is_fp16 = args.in_dtype == Dtype::kFp16;
  const int64_t needed = ceil_div(rows, kernel::kRowsPerWarp) * kernel::kWarp;
  device.launch(config, &params, stream, static_cast<int>(std::min<int64_t>(kernel::kThreads, needed)));
}

}  // namespace mla_fp8::cuda
