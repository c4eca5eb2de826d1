// The CUDA side of the ops: a record that passed every check -> one kernel on `stream`.
// Throws std::runtime_error whose message starts with the op's name.
#pragma once

#include "product.h"
#include "quantize.h"

namespace mla_fp8::cuda {

void launch_product(const Product& product, int device_index, void* stream);
void launch_quantize_q_nope(const QuantizeArgs& args, int device_index, void* stream);

// The greatest power of 2, at most 16, that divides the address and the byte strides of a tensor's
// outer dims. A stride along a dim of extent 1 does not matter.
inline int alignment(const void* data, const i64 (&stride)[2], i64 extent_0, i64 extent_1, int element_bytes) {
  u64 bits = 16 | reinterpret_cast<u64>(data);
  if (extent_0 > 1) bits |= static_cast<u64>(stride[0] * element_bytes);
  if (extent_1 > 1) bits |= static_cast<u64>(stride[1] * element_bytes);
  return static_cast<int>(bits & -bits);
}

}  // namespace mla_fp8::cuda
