// What the launchers of absorb_q, v_up and bmm share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "args.h"
#include "gpu/driver.h"
#include "gpu/tensor_map.h"
#include "kernels/lanes.h"

namespace mla_fp8::cuda {

// Bytes between neighbours along a dim, as far as they matter.
inline uint64_t step_bytes(int64_t extent, int64_t stride, int64_t element_bytes) {
  return extent == 1 ? 0 : static_cast<uint64_t>(stride * element_bytes);
}

// e4m3 [heads, rows, columns], under the swizzle that wgmma reads and in the row order that the tile wants: that of kernels/weights.cuh, or
// of kernels/few_rows.cuh.
inline void encode_weight_map(const char* op, const char* tensor, const uint8_t* weights, const int64_t (&stride)[2],
                              int64_t heads, int64_t rows, int64_t columns, const Tile& tile, TensorMap* map) {
  using Five = uint64_t[5];
  const uint64_t head_bytes = static_cast<uint64_t>(stride[0]), row_bytes = static_cast<uint64_t>(stride[1]);
  const uint64_t lane_rows = static_cast<uint64_t>(tile.lane_columns);
  TensorMapSpec spec{};
  spec.type = TensorMapType::kU8;
  spec.rank = 5;
  spec.address = weights;
  const auto lay_out = [&](const Five& dims, const Five& strides_bytes, const Five& box) {
    std::copy_n(dims, 5, spec.dims);
    std::copy_n(strides_bytes, 5, spec.strides_bytes);
    std::copy_n(box, 5, spec.box);
  };
  const uint64_t u_columns = static_cast<uint64_t>(columns), u_rows = static_cast<uint64_t>(rows);
  const uint64_t u_heads = static_cast<uint64_t>(heads);
  if (tile.swap_ab) {
    const uint64_t warp_rows = kWarpRows * lane_rows;
    lay_out({u_columns, kWarpRows, lane_rows, u_rows / warp_rows, u_heads},
            {0, lane_rows * row_bytes, row_bytes, warp_rows * row_bytes, head_bytes},
            {kScaleGroup, kWarpRows, 2, kWarpgroupWarps, 1});
  } else {
    lay_out({u_columns, 2, kQuad, u_rows / 2, u_heads},
            {0, row_bytes, lane_rows * row_bytes, 2 * row_bytes, head_bytes},
            {kScaleGroup, 2, kQuad, lane_rows / 2, 1});
  }
  spec.swizzle = Swizzle::k128Bytes;
  encode_tensor_map(op, tensor, spec, map);
}

}  // namespace mla_fp8::cuda
