// Rows of activations in and out: load to fp32, quantize 1x128 groups, store as bf16, fp16 or e4m3.
//     scale = max(amax |x|, floor) / 448;   value = e4m3(clamp(x * (1 / scale), +-448))
// Included by each instruction-set file, which vectorizes these loops for itself.
#pragma once

#include "cpu/convert.h"
#include "cpu/gemm.h"

namespace mla_fp8::cpu {
namespace {

MLA_FP8_INLINE int64_t bytes_per_element(Dtype dtype) { return dtype == Dtype::kE4m3 ? 1 : 2; }

MLA_FP8_INLINE const void* element(const void* base, Dtype dtype, int64_t offset) {
  return static_cast<const char*>(base) + offset * bytes_per_element(dtype);
}

MLA_FP8_INLINE void* element(void* base, Dtype dtype, int64_t offset) {
  return static_cast<char*>(base) + offset * bytes_per_element(dtype);
}

MLA_FP8_INLINE void load_row(const void* in, Dtype dtype, int64_t count, float* x) {
  if (dtype == Dtype::kBf16) {
    const auto* values = static_cast<const uint16_t*>(in);
    for (int64_t i = 0; i < count; ++i) x[i] = bf16_to_float(values[i]);
  } else if (dtype == Dtype::kFp16) {
    const auto* values = static_cast<const uint16_t*>(in);
    for (int64_t i = 0; i < count; ++i) x[i] = fp16_to_float(values[i]);
  } else {
    const auto* values = static_cast<const uint8_t*>(in);
    for (int64_t i = 0; i < count; ++i) x[i] = e4m3_to_float(values[i]);
  }
}

// max(amax |x|, floor) of 128 values, as bits. As unsigned integers NaN > Inf > any finite |x|, so
// an integer maximum propagates NaN.
MLA_FP8_INLINE uint32_t group_amax(const float* x, float amax_floor) {
  uint32_t amax = bits_of(amax_floor);
  for (int64_t i = 0; i < kScaleGroup; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & kFp32AbsMask;
    amax = magnitude > amax ? magnitude : amax;
  }
  return amax;
}

// The scale of 128 values.
MLA_FP8_INLINE float group_scale(const float* x, float amax_floor) {
  return float_of(group_amax(x, amax_floor)) / kE4m3Max;
}

// Quantizes 128 values in place, to kActivationLift times their e4m3 values, and returns their
// scale. The clamp has no work here: |x| * (1 / scale) is at most 448 * (1 + 2^-22), which rounds
// to 448. In a row with Inf, whose reciprocal is 0, Inf becomes NaN, as the formula says. A zero's
// sign, which round_in_range loses, cannot reach a sum from +0.
MLA_FP8_INLINE float quantize_lifted(float* x) {
  const float scale = group_scale(x, kAmaxFloor);
  const float lifted_reciprocal = (1.0f / scale) * kActivationLift;
  for (int64_t i = 0; i < kScaleGroup; ++i) x[i] = round_in_range(x[i] * lifted_reciprocal, kActivationLift);
  return scale;
}

// Exact activations: the power of two by which 128 values are divided, so that the largest lies in
// [2^-32, 2^33). It is 1 for what models have. Sums of the rest cannot overflow, and only values
// below 2^-94 of the largest get subnormal. Its product with a weight's scale does not overflow
// where the result does not, and a subnormal product is off by less than half a step of the result.
// It is NaN where a value is NaN or Inf, and makes all that the row gives NaN.
constexpr uint32_t kLeastExponent = kFp32Bias - 32, kMostExponent = kFp32Bias + 32;
MLA_FP8_INLINE float range_scale(const float* x) {
  const uint32_t amax = group_amax(x, 0.0f);
  if (amax >= kFp32Inf) return float_of(kFp32Nan);
  const uint32_t exponent = amax >> kFp32MantissaBits;
  const uint32_t at_least = exponent < kLeastExponent ? kLeastExponent : exponent;
  const uint32_t nearest = at_least > kMostExponent ? kMostExponent : at_least;
  return float_of((kFp32Bias + exponent - nearest) << kFp32MantissaBits);
}

// out[i] is the code of the e4m3 value nearest to x[i] * reciprocal.
MLA_FP8_INLINE void store_codes(const float* x, int64_t count, float reciprocal, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = e4m3_code(round_to_e4m3(x[i] * reciprocal));
}

// Stores fp32 values as dtype; e4m3 takes 1 / out_scale.
MLA_FP8_INLINE void store_row(const float* x, int64_t count, void* out, Dtype dtype, float reciprocal) {
  if (dtype == Dtype::kBf16) {
    auto* values = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < count; ++i) values[i] = float_to_bf16(x[i]);
  } else if (dtype == Dtype::kFp16) {
    auto* values = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < count; ++i) values[i] = float_to_fp16(x[i]);
  } else {
    store_codes(x, count, reciprocal, static_cast<uint8_t*>(out));
  }
}

// Rows [row_begin, row_end) of one head: q_nope to q_val and q_scale; rows from s on are padding.
MLA_FP8_INLINE void quantize_rows(const QuantizeArgs& args, int64_t head, int64_t row_begin, int64_t row_end) {
  const int64_t groups = args.k / kScaleGroup;
  for (int64_t row = row_begin; row < row_end; ++row) {
    uint8_t* val = args.q_val + head * args.q_val_stride[0] + row * args.q_val_stride[1];
    float* scale = args.q_scale + head * args.q_scale_stride[0] + row * args.q_scale_stride[1];
    if (row >= args.s) {
      std::memset(val, 0, static_cast<size_t>(args.k));
      for (int64_t group = 0; group < groups; ++group) scale[group * args.q_scale_stride[2]] = 0.0f;
      continue;
    }
    const void* in = element(args.q_nope, args.in_dtype, row * args.q_nope_stride[0] + head * args.q_nope_stride[1]);
    for (int64_t group = 0; group < groups; ++group) {
      float x[kScaleGroup];
      load_row(element(in, args.in_dtype, group * kScaleGroup), args.in_dtype, kScaleGroup, x);
      const float x_scale = group_scale(x, args.amax_floor);
      scale[group * args.q_scale_stride[2]] = x_scale;
      store_codes(x, kScaleGroup, 1.0f / x_scale, val + group * kScaleGroup);
    }
  }
}

}  // namespace
}  // namespace mla_fp8::cpu
