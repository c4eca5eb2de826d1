// Tensor maps: what the copy engine knows of a tensor in global memory.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace mla_fp8::cuda {

enum class TensorMapType : uint32_t {
  kU8 = 0,
  kFp16 = 6,
  kFp32 = 7,
  kBf16 = 9
};  // as CUtensorMapDataType; e4m3 is kU8
enum class Swizzle : uint32_t { kNone = 0, k32Bytes = 1, k64Bytes = 2, k128Bytes = 3 };  // as CUtensorMapSwizzle

inline constexpr int kMaxTensorMapRank = 5;

// A tiled tensor map. Dim 0 is contiguous. Elements out of bounds read as zero and are not written.
struct TensorMapSpec {
  TensorMapType type;
  int rank;                                   // 1 to 5
  const void* address;                        // 16-byte aligned
  uint64_t dims[kMaxTensorMapRank];           // elements, each >= 1
  uint64_t strides_bytes[kMaxTensorMapRank];  // multiples of 16; entry 0 is not read, nor those of dims of extent 1
  uint32_t box[kMaxTensorMapRank];            // elements, each <= 256
  Swizzle swizzle = Swizzle::kNone;
};

// Gives the map of `spec`; `tensor` names it in the error. Needs no current context. A map holds nothing but what the spec
// says, so each thread keeps its latest ones, found by the whole spec.
void encode_tensor_map(const char* op, const char* tensor, const TensorMapSpec& spec, TensorMap* map);

}  // namespace mla_fp8::cuda
