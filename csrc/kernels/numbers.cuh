// One number format at a time: activations in, e4m3 between, bf16, fp16 or e4m3 out.
#pragma once

#include "constants.h"
#include "kernels/ptx/convert.cuh"
#include "types.h"

namespace mla_fp8 {

inline constexpr u32 kFullWarp = 0xffffffffu;

// Two activations in a word; as outputs, elements of two bytes.
struct Bf16 {
  static constexpr int kBytes = 2;
  static MLA_FP8_DEVICE float low(u32 word) { return __uint_as_float(word << 16); }
  static MLA_FP8_DEVICE float high(u32 word) { return __uint_as_float(word & 0xffff0000u); }
  // For split(): two values in the scale at which a number's exponent field is that of the e4m3
  // that it is cut to, and what is cut off then. An e4m3 stands at kCutBits and up, its sign apart.
  static constexpr int kCutBits = 4;
  struct Scale {
    u32 to_least;  // 1 / s in both halves
    MLA_FP8_DEVICE explicit Scale(u32 exponent) : to_least((254 - exponent) << 7 | (254 - exponent) << 23) {}
    MLA_FP8_DEVICE u32 operator()(u32 word) const {
      constexpr u32 kTwoToMinus120 = 0x03800380;
      return ptx::mul_rn_bf16x2(ptx::mul_rn_bf16x2(word, to_least), kTwoToMinus120);
    }
  };
  static MLA_FP8_DEVICE u32 subtract(u32 a, u32 b) { return ptx::sub_rn_bf16x2(a, b); }
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
  static constexpr int kCutBits = 7;
  struct Scale {
    u32 half[2];  // 2^-8 / s as two factors, since one may be out of fp16's range
    MLA_FP8_DEVICE explicit Scale(u32 exponent) {
      const i32 power = max(-16, min(24, 119 - static_cast<i32>(exponent)));
      const i32 first = power >> 1;
      half[0] = static_cast<u32>(first + 15) * 0x04000400u,
      half[1] = static_cast<u32>(power - first + 15) * 0x04000400u;
    }
    MLA_FP8_DEVICE u32 operator()(u32 word) const {
      return ptx::mul_rn_f16x2(ptx::mul_rn_f16x2(word, half[0]), half[1]);
    }
  };
  static MLA_FP8_DEVICE u32 subtract(u32 a, u32 b) { return ptx::sub_rn_f16x2(a, b); }
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
  // Of twice each half: the sign is shifted out, and into the last bit of its neighbour, which is
  // dropped in the end. A shift finds a free pipe, where a mask would wait for the maximum's.
  u32 amax = 0;
#pragma unroll
  for (u32 word : words) amax = ptx::max_u16x2(amax, word << 1);
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) amax = ptx::max_u16x2(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
  return (ptx::max_u16x2(amax, amax >> 16) & 0xffffu) >> 1;
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
// but the least values: each is what the ones before it left, cut towards zero, and the scale is
// the least power of two that makes the group's amax at most 448.
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
    const typename Element::Scale scale(exponent);
    constexpr u32 kKept = 0x00010001u * (0x10000u - (1u << Element::kCutBits));
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      constexpr int kHighBytes = 0x7531, kShift = 8 - Element::kCutBits;
      u32 low = scale(words[2 * i]), high = scale(words[2 * i + 1]);
      const u32 signs = __byte_perm(low, high, kHighBytes);  // of every term
#pragma unroll
      for (int t = 0; t < S::kTerms; ++t) {
        const u32 magnitudes = __byte_perm(low << kShift, high << kShift, kHighBytes);
        term[t][i] = signs ^ ((signs ^ magnitudes) & 0x7f7f7f7fu);
        if (t + 1 == S::kTerms) break;
        low = Element::subtract(low, low & kKept), high = Element::subtract(high, high & kKept);
      }
    }
    return amax <= kFloatMax ? __uint_as_float(exponent << 23) : __uint_as_float(0x7fffffffu);
  }
}

}  // namespace mla_fp8
