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

// e4m3 [heads, rows, columns], under the swizzle that wgmma reads and in the row order of kernels/weights.cuh.
inline void encode_weight_map(const char* op, const char* tensor, const uint8_t* weights, const int64_t (&stride)[2],
                              int64_t heads, int64_t rows, int64_t columns, int lane_columns, TensorMap* map) {
  TensorMapSpec spec{};
  spec.type = TensorMapType::kU8;
  spec.rank = 5;
  spec.address = weights;
  const uint64_t head_bytes = static_cast<uint64_t>(stride[0]), row_bytes = static_cast<uint64_t>(stride[1]);
  const uint64_t dims[] = {static_cast<uint64_t>(columns), 2, kQuad, static_cast<uint64_t>(rows) / 2,
                           static_cast<uint64_t>(heads)};
  const uint64_t strides_bytes[] = {0, row_bytes, lane_columns * row_bytes, 2 * row_bytes, head_bytes};
  const uint32_t box[] = {kScaleGroup, 2, kQuad, static_cast<uint32_t>(lane_columns) / 2, 1};
  std::copy_n(dims, 5, spec.dims);
  std::copy_n(strides_bytes, 5, spec.strides_bytes);
  std::copy_n(box, 5, spec.box);
  spec.swizzle = Swizzle::k128Bytes;
  encode_tensor_map(op, tensor, spec, map);
}

}  // namespace mla_fp8::cuda
