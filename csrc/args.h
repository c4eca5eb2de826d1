// What each op needs once every check has passed: plain pointers, strides in elements, extents.
// The bindings fill these; CPU kernels and CUDA launchers read the same ones.
#pragma once

#include <cstdint>

#include "product.h"

namespace mla_fp8 {

// q_nope [S,H,K] -> q_val [H,M,K], q_scale [H,M,K/128]
struct QuantizeArgs {
  const void* q_nope;         // bf16 or fp16
  int64_t q_nope_stride[2];   // s, h
  uint8_t* q_val;             // e4m3
  int64_t q_val_stride[2];    // h, m
  float* q_scale;
  int64_t q_scale_stride[3];  // h, m, k / 128
  int64_t s, h, m, k;         // m >= s
  float amax_floor;
  bool zero_pad;              // write zeros to rows s..m-1 of q_val and q_scale
  Dtype in_dtype;
};

// a [B,M,K] x b [B,N,K]^T -> c [B,m,N], of which the first m rows are read
struct BmmArgs {
  const uint8_t* a;           // e4m3
  int64_t a_stride[2];        // b, m
  const float* a_scale;       // [B,M,K/128]
  int64_t a_scale_stride[3];  // b, m, k / 128
  const uint8_t* b;           // e4m3
  int64_t b_stride[2];        // b, n
  const float* b_scale;       // [B,N/128,K/128]
  int64_t b_scale_stride[3];  // b, n / 128, k / 128
  void* c;                    // bf16
  int64_t c_stride[2];        // b, m
  int64_t batch, m, n, k;
};

// q_nope [S,H,D] x w_uk [H,R,D]^T, with q_pe [S,H,P] beside it -> q [S,H,R+P]
struct AbsorbQArgs {
  const void* q_nope;
  int64_t q_nope_stride[2];      // s, h
  const uint8_t* w_uk;           // e4m3
  int64_t w_uk_stride[2];        // h, r
  const float* w_uk_scale;       // [H,R/128,D/128]
  int64_t w_uk_scale_stride[3];  // h, r / 128, d / 128
  const void* q_pe;              // null: no rope columns, p = 0
  int64_t q_pe_stride[2];        // s, h
  const float* out_scale;        // null: q has in_dtype; else one value on the device and q is e4m3
  void* q;
  int64_t q_stride[2];           // s, h
  int64_t s, h, d, r, p;
  Dtype in_dtype, out_dtype;
};

// o_latent [S,H,R] x w_uv [H,V,R]^T -> v [S,H,V], or v_val [S,H,V] with v_scale [S,H]
struct VUpArgs {
  const void* o_latent;
  int64_t o_latent_stride[2];    // s, h
  const uint8_t* w_uv;           // e4m3
  int64_t w_uv_stride[2];        // h, v
  const float* w_uv_scale;       // [H,V/128,R/128]
  int64_t w_uv_scale_stride[3];  // h, v / 128, r / 128
  const float* out_scale;        // as in AbsorbQArgs; null for v_up_quantized
  void* v;
  int64_t v_stride[2];           // s, h
  float* v_scale;                // null: v_up; else v_up_quantized, v is e4m3
  int64_t v_scale_stride[2];     // s, h
  int64_t s, h, r, v_dim;
  Dtype in_dtype, out_dtype;
};

// Runs body(begin, end, context) over parts of [0, count), on several threads where there are some.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context),
                             void* context);

}  // namespace mla_fp8
