// Number formats, one value at a time: bf16, fp16 and e4m3 to and from fp32, round to nearest even.
// They are written without branches, so that loops over them vectorize, and without fp32
// subnormals, so that a caller's flush-to-zero mode changes nothing. No std:: templates are used
// here, because each instruction-set file must get its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "constants.h"

namespace mla_fp8::cpu {
namespace {

#define MLA_FP8_INLINE static inline __attribute__((always_inline, unused))

constexpr float kE4m3MinNormal = 0x1p-6f;
constexpr uint32_t kE4m3Nan = 0x7f;  // e4m3fn: the one NaN code of each sign, and no infinity
constexpr int kE4m3MantissaBits = 3;
constexpr int kE4m3Bias = 7;
constexpr int kBf16MantissaBits = 7;
constexpr int kFp16MantissaBits = 10;
constexpr int kFp16Bias = 15;
constexpr int kFp32MantissaBits = 23;
constexpr int kFp32Bias = 127;
constexpr uint32_t kFp32AbsMask = 0x7fffffffu;
constexpr uint32_t kFp32Inf = 0x7f800000u;
constexpr uint32_t kFp32Nan = 0x7fc00000u;

MLA_FP8_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

MLA_FP8_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

MLA_FP8_INLINE float bf16_to_float(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

MLA_FP8_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (u >> 16) | 0x40u;
  return static_cast<uint16_t>((u & kFp32AbsMask) > kFp32Inf ? quiet_nan : rounded);
}

MLA_FP8_INLINE float fp16_to_float(uint16_t x) {
  constexpr int kShift = kFp32MantissaBits - kFp16MantissaBits;
  constexpr uint32_t kRebias = static_cast<uint32_t>(kFp32Bias - kFp16Bias) << kFp32MantissaBits;
  constexpr uint32_t kMinNormal = kRebias + (1u << kFp32MantissaBits);  // 2^-14
  const uint32_t sign = (x & 0x8000u) << 16;
  const uint32_t wide = (x & 0x7fffu) << kShift;
  const uint32_t normal = wide + kRebias;
  const uint32_t subnormal = bits_of(float_of(wide + kMinNormal) - float_of(kMinNormal));
  const uint32_t inf_or_nan = normal + kRebias;
  const uint32_t finite = (x & 0x7c00u) == 0 ? subnormal : normal;
  return float_of(sign | ((x & 0x7c00u) == 0x7c00u ? inf_or_nan : finite));
}

MLA_FP8_INLINE uint16_t float_to_fp16(float x) {
  constexpr int kShift = kFp32MantissaBits - kFp16MantissaBits;
  constexpr uint32_t kRebias = static_cast<uint32_t>(kFp32Bias - kFp16Bias) << kFp32MantissaBits;
  // ulp(0.5) = 2^-24, the step of fp16 subnormals.
  constexpr float kMinNormal = 0x1p-14f, kSubnormalMagic = 0.5f;
  const uint32_t u = bits_of(x);
  const uint32_t a = u & kFp32AbsMask;
  const uint32_t normal = (a - kRebias + ((1u << (kShift - 1)) - 1) + ((a >> kShift) & 1u)) >> kShift;
  const uint32_t subnormal = bits_of(float_of(a) + kSubnormalMagic) - bits_of(kSubnormalMagic);
  const uint32_t finite = a < bits_of(kMinNormal) ? subnormal : normal;
  // 65520 is half a step above 65504, the largest fp16.
  const uint32_t saturated = a >= bits_of(65520.0f) ? 0x7c00u : finite;
  return static_cast<uint16_t>(((u >> 16) & 0x8000u) | (a > kFp32Inf ? 0x7e00u : saturated));
}

MLA_FP8_INLINE float e4m3_to_float(uint8_t x) {
  constexpr int kShift = kFp32MantissaBits - kE4m3MantissaBits;
  constexpr uint32_t kRebias = static_cast<uint32_t>(kFp32Bias - kE4m3Bias) << kFp32MantissaBits;
  constexpr float kSubnormalStep = 0x1p-9f;
  const uint32_t a = x & 0x7fu;
  const uint32_t normal = (a << kShift) + kRebias;
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(a)) * kSubnormalStep);
  const uint32_t finite = a < (1u << kE4m3MantissaBits) ? subnormal : normal;
  return float_of(((x & 0x80u) << 24) | (a == kE4m3Nan ? kFp32Nan : finite));
}

// lift * the e4m3 value nearest to x / lift, for |x| < 464 * lift or NaN and lift a power of two;
// zero loses its sign. Adding and subtracting 1.5 * 2^(e+20), where 2^e is x's binade (2^-6 * lift
// at least: below that e4m3's step is constant), leaves 3 mantissa bits, and it is the adder that
// rounds.
MLA_FP8_INLINE float round_in_range(float x, float lift) {
  constexpr uint32_t kExponentMask = kFp32Inf;
  constexpr uint32_t kHalf = 1u << (kFp32MantissaBits - 1);
  constexpr uint32_t kUp = (static_cast<uint32_t>(kFp32MantissaBits - kE4m3MantissaBits) << kFp32MantissaBits) + kHalf;
  const uint32_t exponent = bits_of(x) & kExponentMask;
  const uint32_t min_exponent = bits_of(kE4m3MinNormal * lift);
  const float magic = float_of((exponent > min_exponent ? exponent : min_exponent) + kUp);
  return (x + magic) - magic;
}

// The e4m3 value nearest to clamp(x, +-448), as fp32; NaN stays NaN, -0 stays -0.
MLA_FP8_INLINE float round_to_e4m3(float x) {
  const uint32_t u = bits_of(x);
  const float magnitude = float_of(u & kFp32AbsMask);
  const float clamped = kE4m3Max < magnitude ? kE4m3Max : magnitude;
  return float_of(bits_of(round_in_range(clamped, 1.0f)) | (u & ~kFp32AbsMask));
}

// The code of a value that round_to_e4m3 returned.
MLA_FP8_INLINE uint8_t e4m3_code(float rounded) {
  constexpr int kShift = kFp32MantissaBits - kE4m3MantissaBits;
  constexpr uint32_t kRebias = static_cast<uint32_t>(kFp32Bias - kE4m3Bias) << kFp32MantissaBits;
  constexpr float kStepsPerUnit = 512.0f;
  const uint32_t u = bits_of(rounded);
  const uint32_t a = u & kFp32AbsMask;
  const float small = a < bits_of(kE4m3MinNormal) ? float_of(a) : 0.0f;
  const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(small * kStepsPerUnit));
  const uint32_t finite = a < bits_of(kE4m3MinNormal) ? subnormal : (a - kRebias) >> kShift;
  return static_cast<uint8_t>(((u >> 24) & 0x80u) | (a > kFp32Inf ? kE4m3Nan : finite));
}

}  // namespace
}  // namespace mla_fp8::cpu
