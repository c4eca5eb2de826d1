// One number format at a time: activations in, e4m3 between, bf16, fp16 or e4m3 out.
#pragma once

#include "constants.h"
#include "kernels/ptx/convert.cuh"
#include "types.h"

namespace mla_fp8 {

inline constexpr u32 kMagnitudes = 0x7fff7fffu;  // clears both sign bits of two bf16 or fp16
inline constexpr u32 kFullWarp = 0xffffffffu;

// Two activations in a word; as outputs, elements of two bytes.
struct Bf16 {
  static constexpr int kBytes = 2;
  static MLA_FP8_DEVICE float low(u32 word) { return __uint_as_float(word << 16); }
  static MLA_FP8_DEVICE float high(u32 word) { return __uint_as_float(word & 0xffff0000u); }
  // Both values times a power of two: exact but for what is far below the least e4m3.
  static MLA_FP8_DEVICE void scale(float (&to)[2], u32 word, float power) {
    const u32 scaled = ptx::mul_rn_bf16x2(word, __byte_perm(__float_as_uint(power), 0, 0x3232));
    to[0] = low(scaled), to[1] = high(scaled);
  }
  template <int kCount>
  static MLA_FP8_DEVICE void pack(const float* value, u32* word) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) word[i] = ptx::cvt_rn_bf16x2_f32(value[2 * i], value[2 * i + 1]);
  }
};

struct Fp16 {
  static constexpr int kBytes = 2;
  static MLA_FP8_DEVICE float low(u32 word) { return ptx::cvt_f32_f16(static_cast<u16>(word)); }
  static MLA_FP8_DEVICE float high(u32 word) { return ptx::cvt_f32_f16(static_cast<u16>(word >> 16)); }
  static MLA_FP8_DEVICE void scale(float (&to)[2], u32 word, float power) {
    to[0] = __fmul_rn(low(word), power), to[1] = __fmul_rn(high(word), power);
  }
  template <int kCount>
  static MLA_FP8_DEVICE void pack(const float* value, u32* word) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) word[i] = ptx::cvt_rn_f16x2_f32(value[2 * i], value[2 * i + 1]);
  }
};

// Four numbers -> four e4m3, the first in the low byte. Beyond +-448 (Inf too) they become +-448,
// NaN stays NaN.
MLA_FP8_DEVICE u32 e4m3x4(float a, float b, float c, float d) {
  return ptx::cvt_rn_satfinite_e4m3x2_f32(a, b) | static_cast<u32>(ptx::cvt_rn_satfinite_e4m3x2_f32(c, d)) << 16;
}

struct E4m3 {
  static constexpr int kBytes = 1;
};

// Two words of activations times `multiplier` -> four e4m3.
template <class Element>
MLA_FP8_DEVICE u32 e4m3x4_scaled(u32 low, u32 high, float multiplier) {
  return e4m3x4(__fmul_rn(Element::low(low), multiplier), __fmul_rn(Element::high(low), multiplier),
                __fmul_rn(Element::low(high), multiplier), __fmul_rn(Element::high(high), multiplier));
}

inline constexpr float kFloatMax = 3.402823466e+38f;

// amax / 448 of a 1x128 group, as __fdiv_rn gives it: the rounded quotient of any amax >=
// kAmaxFloor, without that function's branch. NaN stays NaN.
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

// 16 bytes of shared memory.
MLA_FP8_DEVICE void load_words(u32 (&to)[4], const u8* from) {
  const uint4 vector = *reinterpret_cast<const uint4*>(from);
  to[0] = vector.x, to[1] = vector.y, to[2] = vector.z, to[3] = vector.w;
}

// The largest magnitude of `words`, of two activations each, over kLanes neighbouring lanes, as the
// 16 bits of one activation. NaN wins. All lanes of a warp call it.
template <int kLanes, int kWords>
MLA_FP8_DEVICE u32 amax_bits(const u32 (&words)[kWords]) {
  u32 amax = 0;
#pragma unroll
  for (u32 word : words) amax = ptx::max_u16x2(amax, word & kMagnitudes);
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) amax = ptx::max_u16x2(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
  return ptx::max_u16x2(amax, amax >> 16) & 0xffffu;
}

// The largest magnitude of the values of lanes kFrom apart, of a group of kTo lanes. NaN wins. All
// lanes of a warp call it.
template <int kFrom, int kTo, int kValues>
MLA_FP8_DEVICE float amax_of_lanes(const float (&value)[kValues]) {
  float amax = 0;
#pragma unroll
  for (float one : value) amax = ptx::max_nan_f32(amax, fabsf(one));
#pragma unroll
  for (int lanes = kFrom; lanes < kTo; lanes *= 2)
    amax = ptx::max_nan_f32(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
  return amax;
}

// How 16-bit values become e4m3 terms, whose sum times their group's scale they are. One term is
// the 1x128 quantization of docs/numerics.md. Two of bf16 and three of fp16 hold every bit of all
// but the least values: each is what the ones before it left, rounded, and the scale is the least
// power of two that makes the group's amax at most 448.
template <class Element_, int kTerms_>
struct Split {
  using Element = Element_;
  static constexpr int kTerms = kTerms_;
};

// Calls use(Split{}) with what the product asks for. It branches once, so that nothing inside has
// to; a tile that takes at most kMostTerms is never asked for more.
template <int kMostTerms, class Use>
MLA_FP8_DEVICE void with_split(i32 terms, bool is_fp16, const Use& use) {
  if (kMostTerms >= 2 && terms == 2) {
    use(Split<Bf16, 2>{});
  } else if (kMostTerms >= 3 && terms == 3) {
    use(Split<Fp16, 3>{});
  } else if (is_fp16) {
    use(Split<Fp16, 1>{});
  } else {
    use(Split<Bf16, 1>{});
  }
}

// Calls use(count) with their number alone.
template <int kCount_>
struct TermCount {
  static constexpr int kCount = kCount_;
};
template <int kMostTerms, class Use>
MLA_FP8_DEVICE void with_terms(i32 terms, const Use& use) {
  if (kMostTerms >= 2 && terms == 2) {
    use(TermCount<2>{});
  } else if (kMostTerms >= 3 && terms == 3) {
    use(TermCount<3>{});
  } else {
    use(TermCount<1>{});
  }
}

// The least power of two s >= 2^-126 for which amax <= 448 s, as its biased exponent: 448 is 1.75 x
// 2^8, so a significand above 1.75 takes the next one.
MLA_FP8_DEVICE u32 least_exponent(float amax) {
  constexpr u32 kPastThreeQuarters = 0x1fffff;  // carries into the exponent
  const i32 exponent = static_cast<i32>((__float_as_uint(amax) + kPastThreeQuarters) >> 23) - 8;
  return static_cast<u32>(max(exponent, 1));
}

// Words of two activations -> of each term half as many words of four e4m3, the greatest term
// first; returns the scale of the group, whose amax_bits are given. A group with NaN or Inf has
// scale NaN, or in one term Inf. There is no shuffle in here, because it is called in a branch.
template <class S, int kWords>
MLA_FP8_DEVICE float split(const u32 (&words)[kWords], u32 amax_bits, u32 (&term)[S::kTerms][kWords / 2]) {
  using Element = typename S::Element;
  const float amax = Element::low(amax_bits);
  if constexpr (S::kTerms == 1) {
    const float scale = group_scale(amax);
    const float multiplier = group_multiplier(scale);
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i)
      term[0][i] = e4m3x4_scaled<Element>(words[2 * i], words[2 * i + 1], multiplier);
    return scale;
  } else {
    const u32 exponent = least_exponent(amax);
    const float multiplier = __uint_as_float((254 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      float rest[2][2];
      Element::scale(rest[0], words[2 * i], multiplier);
      Element::scale(rest[1], words[2 * i + 1], multiplier);
#pragma unroll
      for (int t = 0; t < S::kTerms; ++t) {
        const u32 packed = e4m3x4(rest[0][0], rest[0][1], rest[1][0], rest[1][1]);
        term[t][i] = packed;
        if (t + 1 == S::kTerms) break;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const u32 halves = ptx::cvt_rn_f16x2_e4m3x2(static_cast<u16>(packed >> 16 * j));
          rest[j][0] = __fsub_rn(rest[j][0], Fp16::low(halves));
          rest[j][1] = __fsub_rn(rest[j][1], Fp16::high(halves));
        }
      }
    }
    return amax <= kFloatMax ? __uint_as_float(exponent << 23) : __uint_as_float(0x7fffffffu);
  }
}

}  // namespace mla_fp8
