#include <algorithm>
#include <atomic>

#include "gpu/driver.h"
#include "gpu/launch.h"
#include "gpu/tensor_map.h"
#include "kernels/phases.h"

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
  problem.terms = product.terms;
  problem.out_bytes = bytes_of(product.out_dtype);
  const auto aligned = [&](const void* data, const i64(&stride)[2], int element_bytes) {
    return alignment(data, stride, product.s, product.heads, element_bytes);
  };
  const int least = std::min({aligned(product.x, product.x_stride, problem.in_bytes),
                              aligned(product.q_pe, product.q_pe_stride, problem.in_bytes),
                              aligned(product.out, product.out_stride, problem.out_bytes)});
  // The unaligned tiles access single elements.
  problem.align_bytes = std::max(least, problem.in_bytes);
  return problem;
}

using namespace sm90;  // the names in tiles.h

// Of each tile's weights in shared memory (kernels/sm90/weight_order.h).
constexpr sm90::WeightOrder kOrders[] = {
#define MLA_FP8_ORDER(symbol, op, schedule, ...) MLA_FP8_SCHEDULE(schedule)::kOrder,
    MLA_FP8_TILES(MLA_FP8_ORDER)
#undef MLA_FP8_ORDER
};

// e4m3 [heads,n,k] in the order of rows that the tile wants.
TensorMapSpec weight_map(const Product& product, const Tile& tile) {
  const sm90::WeightOrder& order = kOrders[&tile - kTiles];
  const u64 n = product.n, k = product.k, heads = product.heads;
  const u64 head_bytes = product.w_stride[0], row_bytes = product.w_stride[1];
  const auto rows = [&](int i) { return static_cast<u64>(order.stride[i]) * row_bytes; };
  const auto box = [&](int i) { return static_cast<u32>(order.box[i]); };
  const u64 x = order.extent[0], y = order.extent[1], z = n / static_cast<u64>(order.stride[2]);
  return {product.w,
          {k, x, y, z, heads},
          {0, rows(0), rows(1), rows(2), head_bytes},
          {kScaleGroup, box(0), box(1), box(2), 1}};
}

}  // namespace

void launch_product(const Product& product, int device_index, void* stream) {
  const char* op = product.out_row_scale != nullptr ? "v_up_quantized" : op_name(product.op);
  const CurrentDevice device(op, device_index);
  if (product.s == 0 || product.heads == 0) return;

  const Config config = choose_config(problem_of(product), device.limits());
  const char* weights = product.op == Op::kAbsorbQ ? "w_uk" : product.op == Op::kVUp ? "w_uv" : "b";
  sm90::Params params{};
  encode_tensor_map(op, weights, weight_map(product, *config.tile), &params.w);
  params.product = product;
  if (config.tile->phased) {
    static std::atomic<u32> launches{0};
    params.phase_slot = launches.fetch_add(1, std::memory_order_relaxed) % phases::kSlots;
  }
  device.launch(config, &params, stream);
}

}  // namespace mla_fp8::cuda
