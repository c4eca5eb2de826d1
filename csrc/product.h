// The one record of a product. absorb_q, v_up, v_up_quantized and bmm fill it once every check has
// passed; the CPU code, the launcher and the kernels read it: plain pointers, strides in elements,
// extents. NVRTC compiles this too.
//
//     out[s,h,:N] = sum over blocks k of  x_scale[s,h,k] * w_scale[h,n/128,k]
//                                         * (x_val[s,h,128 k..] . w[h,n,128 k..])
//     out[s,h,N:] = q_pe[s,h,:]
//
// where x_val, x_scale are the 1x128 quantization of a 16-bit x or the terms that hold it
// (docs/numerics.md), or are given.
// What each op calls them:
//
//                     s  heads  n  k    x         w     q_pe  out
//     absorb_q        S  H      R  D    q_nope    w_uk  q_pe  q
//     v_up            S  H      V  R    o_latent  w_uv  -     v
//     v_up_quantized  S  H      V  R    o_latent  w_uv  -     v_val, out_row_scale is v_scale
//     bmm             m  B      N  K    a         b     -     c
#pragma once

#include "constants.h"

namespace mla_fp8 {

enum class Op : u8 { kQuantizeQNope, kBmm, kAbsorbQ, kVUp };
enum class Dtype : u8 { kBf16, kFp16, kE4m3, kFp32, kOther };

struct Product {
  const void* x;  // [s,heads,k] bf16, fp16, or e4m3 with x_scale; the last dim is contiguous
  const float* x_scale;  // [s,heads,k/128], with e4m3; else null
  const u8* w;  // [heads,n,k] e4m3, the last dim is contiguous
  const float* w_scale;  // [heads,n/128,k/128]
  const void* q_pe;  // [s,heads,pe] like x, or null: pe = 0
  const float* out_scale;  // one value on the device: out is e4m3 of the value / out_scale; or null
  void* out;  // [s,heads,n+pe] bf16, fp16 or e4m3, the last dim is contiguous
  // [s,heads], written: out is e4m3 in rows of n = 128, each of which shares a scale; or null.
  float* out_row_scale;
  i64 x_stride[2];  // s, head
  i64 x_scale_stride[3];  // s, head, k / 128
  i64 w_stride[2];  // head, n
  i64 w_scale_stride[3];  // head, n / 128, k / 128
  i64 q_pe_stride[2];  // s, head
  i64 out_stride[2];  // s, head
  i64 out_row_scale_stride[2];  // s, head
  i64 s, heads, n, k, pe;
  Op op;
  Dtype x_dtype, out_dtype;
  // e4m3 terms that a value of x becomes: 1, quantized (FP8 activations; also of e4m3 x); or 2 of
  // bf16 and 3 of fp16, exact.
  i32 terms;
};

}  // namespace mla_fp8
