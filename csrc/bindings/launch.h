// What the launchers of absorb_q, v_up and bmm share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "args.h"
#include "bindings/driver.h"
#include "bindings/tensor_map.h"
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
  constexpr uint32_t kLanesOfRows = 8, kWarps = 4;
  TensorMapSpec spec{};
  spec.type = TensorMapType::kU8;
  spec.rank = 5;
  spec.address = weights;
  const uint64_t head_bytes = static_cast<uint64_t>(stride[0]), row_bytes = static_cast<uint64_t>(stride[1]);
  const uint64_t lane_rows = static_cast<uint64_t>(tile.lane_columns), u_rows = static_cast<uint64_t>(rows);
  using Five = uint64_t[5];
  const Five turned_dims = {static_cast<uint64_t>(columns), kLanesOfRows, lane_rows,
                            u_rows / (kLanesOfRows * lane_rows), static_cast<uint64_t>(heads)};
  const Five turned_strides = {0, lane_rows * row_bytes, row_bytes, kLanesOfRows * lane_rows * row_bytes, head_bytes};
  const Five turned_box = {kScaleGroup, kLanesOfRows, 2, kWarps, 1};
  const Five dims = {static_cast<uint64_t>(columns), 2, kQuad, u_rows / 2, static_cast<uint64_t>(heads)};
  const Five strides = {0, row_bytes, lane_rows * row_bytes, 2 * row_bytes, head_bytes};
  const Five box = {kScaleGroup, 2, kQuad, lane_rows / 2, 1};
  std::copy_n(tile.turned ? turned_dims : dims, 5, spec.dims);
  std::copy_n(tile.turned ? turned_strides : strides, 5, spec.strides_bytes);
  std::copy_n(tile.turned ? turned_box : box, 5, spec.box);
  spec.swizzle = Swizzle::k128Bytes;
  encode_tensor_map(op, tensor, spec, map);
}

}  // namespace mla_fp8::cuda
