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
  const u64 head_bytes = stride[0], row_bytes = stride[1], lane_rows = tile.lane_columns;
  const u64 warp_rows = kWarpRows * lane_rows;
  const u64 u_columns = columns, u_rows = rows, u_heads = heads;
  TensorMapSpec spec{weights,
                     {u_columns, 2, kQuad, u_rows / 2, u_heads},
                     {0, row_bytes, lane_rows * row_bytes, 2 * row_bytes, head_bytes},
                     {kScaleGroup, 2, kQuad, static_cast<u32>(lane_rows) / 2, 1}};
  if (tile.swap_ab) {
    spec = {weights,
            {u_columns, kWarpRows, lane_rows, u_rows / warp_rows, u_heads},
            {0, lane_rows * row_bytes, row_bytes, warp_rows * row_bytes, head_bytes},
            {kScaleGroup, kWarpRows, 2, kWarpgroupWarps, 1}};
  }
  encode_tensor_map(op, tensor, spec, map);
}

}  // namespace mla_fp8::cuda
