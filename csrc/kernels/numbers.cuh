// One number format at a time: activations in, e4m3 between, bf16, fp16 or e4m3 out.
#pragma once

#include "constants.h"
#include "kernels/ptx/convert.cuh"
#include "kernels/types.h"

namespace mla_fp8 {

inline constexpr u32 kMagnitudes = 0x7fff7fffu;  // clears the two sign bits of a word of bf16 or fp16
inline constexpr u32 kFullWarp = 0xffffffffu;

// Two activations in a word.
struct Bf16 {
  static MLA_FP8_DEVICE float low(u32 word) { return __uint_as_float(word << 16); }
  static MLA_FP8_DEVICE float high(u32 word) { return __uint_as_float(word & 0xffff0000u); }
  static MLA_FP8_DEVICE u32 pack(float low, float high) { return ptx::cvt_rn_bf16x2_f32(low, high); }
};

struct Fp16 {
  static MLA_FP8_DEVICE float low(u32 word) { return ptx::cvt_f32_f16(static_cast<u16>(word)); }
  static MLA_FP8_DEVICE float high(u32 word) { return ptx::cvt_f32_f16(static_cast<u16>(word >> 16)); }
  static MLA_FP8_DEVICE u32 pack(float low, float high) { return ptx::cvt_rn_f16x2_f32(low, high); }
};

// Four numbers -> four e4m3, the first in the low byte. Beyond +-448 (Inf too) they become +-448, NaN stays NaN.
MLA_FP8_DEVICE u32 e4m3x4(float a, float b, float c, float d) {
  return ptx::cvt_rn_satfinite_e4m3x2_f32(a, b) | static_cast<u32>(ptx::cvt_rn_satfinite_e4m3x2_f32(c, d)) << 16;
}

// Two words of activations times `multiplier` -> four e4m3.
template <class Element>
MLA_FP8_DEVICE u32 e4m3x4_scaled(u32 low, u32 high, float multiplier) {
  return e4m3x4(__fmul_rn(Element::low(low), multiplier), __fmul_rn(Element::high(low), multiplier),
                __fmul_rn(Element::low(high), multiplier), __fmul_rn(Element::high(high), multiplier));
}

inline constexpr float kFloatMax = 3.402823466e+38f;

// amax / 448 of a 1x128 group, as __fdiv_rn gives it: the rounded quotient of any amax >= kAmaxFloor, without that function's branch. NaN stays NaN.
MLA_FP8_DEVICE float group_scale(float amax) {
  constexpr float kReciprocal = 1.0f / kE4m3Max;
  const float bounded = ptx::max_nan_f32(amax, kAmaxFloor);
  const float guess = __fmul_rn(bounded, kReciprocal);
  const float scale = __fmaf_rn(__fmaf_rn(-kE4m3Max, guess, bounded), kReciprocal, guess);
  return bounded > kFloatMax ? bounded : scale;
}

// 1 / scale as __frcp_rn gives it, for any group_scale().
MLA_FP8_DEVICE float group_multiplier(float scale) {
  const float guess = ptx::rcp_approx_ftz_f32(scale);
  const float multiplier = __fmaf_rn(__fmaf_rn(-scale, guess, 1.0f), guess, guess);
  return scale > kFloatMax ? 0.0f : multiplier;
}

}  // namespace mla_fp8
