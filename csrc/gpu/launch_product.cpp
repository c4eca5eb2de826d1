#include <algorithm>
#include <atomic>

#include "gpu/driver.h"
#include "gpu/forced_tile.h"
#include "gpu/launch.h"
#include "gpu/tensor_map.h"
#include "kernels/absorb_q.h"
#include "kernels/bmm.h"
#include "kernels/lanes.h"
#include "kernels/phases.h"
#include "kernels/v_up.h"

namespace mla_fp8::cuda {
namespace {

int bytes_of(Dtype dtype) { return dtype == Dtype::kE4m3 ? 1 : 2; }

Problem problem_of(const Product& product) {
  Problem problem;
  problem.op = product.op;
  problem.s = product.s;
  problem.heads = product.heads;
  problem.n = product.n;
  problem.k = product.k;
  problem.pe = product.pe;
  problem.in_bytes = bytes_of(product.x_dtype);
  problem.out_bytes = bytes_of(product.out_dtype);
  const auto aligned = [&](const void* data, const i64(&stride)[2], int element_bytes) {
    return alignment(data, stride, product.s, product.heads, element_bytes);
  };
  const int least = std::min({aligned(product.x, product.x_stride, problem.in_bytes),
                              aligned(product.q_pe, product.q_pe_stride, problem.in_bytes),
                              aligned(product.out, product.out_stride, problem.out_bytes)});
  problem.align_bytes = std::max(least, problem.in_bytes);  // the unaligned tiles access single elements
  return problem;
}

// The weights in the order of rows that the tile wants: that of kernels/weights.cuh, or of kernels/few_rows.cuh.
TensorMapSpec weight_map(const Product& product, const Tile& tile) {
  const u64 n = product.n, k = product.k, heads = product.heads;
  const u64 head_bytes = product.w_stride[0], row_bytes = product.w_stride[1], lane_rows = tile.lane_columns;
  if (tile.swap_ab) {
    const u64 warp_rows = kWarpRows * lane_rows;
    return {product.w,
            {k, kWarpRows, lane_rows, n / warp_rows, heads},
            {0, lane_rows * row_bytes, row_bytes, warp_rows * row_bytes, head_bytes},
            {kScaleGroup, kWarpRows, 2, kWarpgroupWarps, 1}};
  }
  return {product.w,
          {k, 2, kQuad, n / 2, heads},
          {0, row_bytes, lane_rows * row_bytes, 2 * row_bytes, head_bytes},
          {kScaleGroup, 2, kQuad, static_cast<u32>(lane_rows / 2), 1}};
}

template <size_t N>
void copy(i64 (&to)[N], const i64 (&from)[N]) {
  std::copy_n(from, N, to);
}

// The kernels' own records: until they take a Product.
absorb_q::Params absorb_q_params(const Product& p, const TensorMap& w, u32 phase_slot) {
  absorb_q::Params params{};
  params.w_uk = w;
  params.q_nope = static_cast<const u16*>(p.x);
  params.q_pe = static_cast<const u16*>(p.q_pe);
  params.w_uk_scale = p.w_scale;
  params.out_scale = p.out_scale;
  params.q = p.out;
  copy(params.q_nope_stride, p.x_stride);
  copy(params.q_pe_stride, p.q_pe_stride);
  copy(params.w_uk_scale_stride, p.w_scale_stride);
  copy(params.q_stride, p.out_stride);
  params.s = static_cast<i32>(p.s), params.h = static_cast<i32>(p.heads), params.d = static_cast<i32>(p.k);
  params.r = static_cast<i32>(p.n), params.pe = static_cast<i32>(p.pe);
  params.is_fp16 = p.x_dtype == Dtype::kFp16;
  params.phase_slot = phase_slot;
  return params;
}

v_up::Params v_up_params(const Product& p, const TensorMap& w) {
  v_up::Params params{};
  params.w_uv = w;
  params.o_latent = static_cast<const u16*>(p.x);
  params.w_uv_scale = p.w_scale;
  params.out_scale = p.out_scale;
  params.v = p.out;
  params.v_scale = p.out_row_scale;
  copy(params.o_latent_stride, p.x_stride);
  copy(params.w_uv_scale_stride, p.w_scale_stride);
  copy(params.v_stride, p.out_stride);
  copy(params.v_scale_stride, p.out_row_scale_stride);
  params.s = static_cast<i32>(p.s), params.h = static_cast<i32>(p.heads), params.r = static_cast<i32>(p.k);
  params.v_dim = static_cast<i32>(p.n);
  params.is_fp16 = p.x_dtype == Dtype::kFp16;
  return params;
}

bmm::Params bmm_params(const Product& p, const TensorMap& w) {
  bmm::Params params{};
  params.b = w;
  params.a = static_cast<const u8*>(p.x);
  params.a_scale = p.x_scale;
  params.b_scale = p.w_scale;
  params.c = p.out;
  params.a_stride[0] = p.x_stride[1], params.a_stride[1] = p.x_stride[0];
  params.a_scale_stride[0] = p.x_scale_stride[1], params.a_scale_stride[1] = p.x_scale_stride[0];
  params.a_scale_stride[2] = p.x_scale_stride[2];
  copy(params.b_scale_stride, p.w_scale_stride);
  params.c_stride[0] = p.out_stride[1], params.c_stride[1] = p.out_stride[0];
  params.m = static_cast<i32>(p.s), params.batch = static_cast<i32>(p.heads), params.n = static_cast<i32>(p.n);
  params.k = static_cast<i32>(p.k);
  return params;
}

}  // namespace

void launch_product(const Product& product, int device_index, void* stream) {
  const char* op = product.out_row_scale != nullptr ? "v_up_quantized" : op_name(product.op);
  const CurrentDevice device(op, device_index);
  if (product.s == 0 || product.heads == 0) return;

  const Config config = choose_config(problem_of(product), device.limits());
  const char* weights = product.op == Op::kAbsorbQ ? "w_uk" : product.op == Op::kVUp ? "w_uv" : "b";
  TensorMap w;
  encode_tensor_map(op, weights, weight_map(product, *config.tile), &w);
  static std::atomic<u32> phased_launches{0};
  const u32 phase_slot =
      config.tile->phased ? phased_launches.fetch_add(1, std::memory_order_relaxed) % phases::kSlots : 0;

  const auto launch = [&](const auto& params) { device.launch(config, &params, stream); };
  if (product.op == Op::kAbsorbQ) launch(absorb_q_params(product, w, phase_slot));
  if (product.op == Op::kVUp) launch(v_up_params(product, w));
  if (product.op == Op::kBmm) launch(bmm_params(product, w));
}

}  // namespace mla_fp8::cuda
