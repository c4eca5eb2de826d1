// Types that host code, nvcc and NVRTC share. NVRTC has no <cstdint> and no <cuda.h>, so they are
// made here.
#pragma once

#if defined(__CUDACC__)
#define MLA_FP8_DEVICE __device__ __forceinline__
#define MLA_FP8_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MLA_FP8_HOST_DEVICE inline
#endif

namespace mla_fp8 {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;
static_assert(sizeof(u8) == 1 && sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8 && sizeof(i64) == 8);

// CUtensorMap: passed to a kernel inside its __grid_constant__ Params, encoded by
// cuda::encode_tensor_map.
struct alignas(128) TensorMap {
  u64 opaque[16];
};
static_assert(sizeof(TensorMap) == 128);

}  // namespace mla_fp8
