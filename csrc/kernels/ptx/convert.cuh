// Conversions between the formats of activations, and the packed integer maximum that finds an
// amax.
#pragma once

#include "types.h"

namespace mla_fp8::ptx {

// Two floats -> two e4m3, `low` in the low byte: round to nearest even, beyond +-448 (Inf too)
// becomes +-448, NaN stays NaN. PTX names the high operand first. Used by every kernel that
// quantizes.
MLA_FP8_DEVICE u16 cvt_rn_satfinite_e4m3x2_f32(float low, float high) {
  u16 packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

// Two products or differences of bf16 or fp16, each rounded to nearest even; subnormal numbers
// count. Used to split activations into terms.
MLA_FP8_DEVICE u32 mul_rn_bf16x2(u32 a, u32 b) {
  u32 product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
MLA_FP8_DEVICE u32 mul_rn_f16x2(u32 a, u32 b) {
  u32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
MLA_FP8_DEVICE u32 sub_rn_bf16x2(u32 a, u32 b) {
  u32 difference;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}
MLA_FP8_DEVICE u32 sub_rn_f16x2(u32 a, u32 b) {
  u32 difference;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}

// fp16 -> fp32, exact. Used by every kernel that reads fp16.
MLA_FP8_DEVICE float cvt_f32_f16(u16 half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

// The greater of each 16-bit half. On bf16 or fp16 shifted left by their sign this is the greater
// magnitude; any NaN wins.
MLA_FP8_DEVICE u32 max_u16x2(u32 a, u32 b) {
  u32 greater;
  asm("max.u16x2 %0, %1, %2;" : "=r"(greater) : "r"(a), "r"(b));
  return greater;
}

// Two floats -> two bf16 or fp16, `low` in the low half, round to nearest even. Used by every
// kernel that writes them.
MLA_FP8_DEVICE u32 cvt_rn_bf16x2_f32(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
MLA_FP8_DEVICE u32 cvt_rn_f16x2_f32(float low, float high) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// 1 / x within one ulp, for the Newton step of group_multiplier().
MLA_FP8_DEVICE float rcp_approx_ftz_f32(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

// The greater of two floats, NaN if either is: an amax must not lose a NaN.
MLA_FP8_DEVICE float max_nan_f32(float a, float b) {
  float greater;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(greater) : "f"(a), "f"(b));
  return greater;
}

}  // namespace mla_fp8::ptx
