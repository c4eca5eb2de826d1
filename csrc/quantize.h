// The record of quantize_q_nope, as product.h's is that of a product: plain pointers, strides in
// elements, extents.
#pragma once

#include "product.h"

namespace mla_fp8 {

// q_nope [S,H,K] -> q_val [H,M,K], q_scale [H,M,K/128]
struct QuantizeArgs {
  const void* q_nope;      // bf16 or fp16
  i64 q_nope_stride[2];    // s, h
  u8* q_val;               // e4m3
  i64 q_val_stride[2];     // h, m
  float* q_scale;
  i64 q_scale_stride[3];   // h, m, k / 128
  i64 s, h, m, k;          // m >= s
  float amax_floor;
  bool zero_pad;           // write zeros to rows s..m-1 of q_val and q_scale
  Dtype in_dtype;
};

}  // namespace mla_fp8
