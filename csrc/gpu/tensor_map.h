// Tensor maps: what the copy engine knows of a tensor in global memory.
#pragma once

#include <array>

#include "types.h"

namespace mla_fp8::cuda {

// A tiled map of e4m3 under the 128-byte swizzle. Dim 0 is contiguous.
struct TensorMapSpec {
  const void* address;               // 16-byte aligned
  std::array<u64, 5> dims;           // elements, each >= 1
  // Multiples of 16. Entry 0 is not read, nor are those of dims of extent 1.
  std::array<u64, 5> strides_bytes;
  std::array<u32, 5> box;            // elements, each <= 256
};

// Gives the map of `spec`; `tensor` names it in the error. This needs no current context. A map
// holds nothing but what the spec says, so each thread keeps its latest ones, found by the whole
// spec.
void encode_tensor_map(const char* op, const char* tensor, const TensorMapSpec& spec, TensorMap* map);

}  // namespace mla_fp8::cuda
