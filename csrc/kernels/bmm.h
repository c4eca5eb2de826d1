// What bmm's launcher and kernel share: the kernel's argument. Its shared memory is kloop::SharedStorage.
#pragma once

#include "kernels/kloop.h"
#include "kernels/types.h"

namespace mla_fp8::bmm {

struct Params {
  TensorMap b;            // e4m3 [B,N,K], boxes of 128 x 128 in lane order (kernels/weights.cuh), 128-byte swizzle
  const u8* a;            // e4m3 [B,M,K]; rows >= m are not read
  const float* a_scale;   // [B,M,K/128]
  const float* b_scale;   // [B,N/128,K/128]
  void* c;                // bf16 [B,m,N]
  i64 a_stride[2];        // b, m
  i64 a_scale_stride[3];  // b, m, k / 128
  i64 b_scale_stride[3];  // b, n / 128, k / 128
  i64 c_stride[2];        // b, m
  i32 m, batch, n, k;
};

}  // namespace mla_fp8::bmm
