// What the launchers of absorb_q, v_up and bmm share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "args.h"
#include "bindings/driver.h"
#include "bindings/tensor_map.h"

namespace mla_fp8::cuda {

// Bytes between neighbours along a dim, as far as they matter.
inline uint64_t step_bytes(int64_t extent, int64_t stride, int64_t element_bytes) {
  return extent == 1 ? 0 : static_cast<uint64_t>(stride * element_bytes);
}

// e4m3 [heads, rows, columns], its 128x128 tiles under the swizzle that wgmma reads.
inline void encode_weight_map(const char* op, const char* tensor, const uint8_t* weights, const int64_t (&stride)[2],
                              int64_t heads, int64_t rows, int64_t columns, TensorMap* map) {
  TensorMapSpec spec{};
  spec.type = TensorMapType::kU8;
  spec.rank = 3;
  spec.address = weights;
  spec.dims[0] = static_cast<uint64_t>(columns);
  spec.dims[1] = static_cast<uint64_t>(rows);
  spec.dims[2] = static_cast<uint64_t>(heads);
  spec.strides_bytes[1] = static_cast<uint64_t>(stride[1]);
  spec.strides_bytes[2] = static_cast<uint64_t>(stride[0]);
  spec.box[0] = static_cast<uint32_t>(kScaleGroup);
  spec.box[1] = static_cast<uint32_t>(kScaleGroup);
  spec.box[2] = 1;
  spec.swizzle = Swizzle::k128Bytes;
  encode_tensor_map(op, tensor, spec, map);
}

}  // namespace mla_fp8::cuda
