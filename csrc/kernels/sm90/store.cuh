// Stores: what becomes of the sums. 16-bit elements, or e4m3 by one scale or by a scale a row; q_pe beside the latent.
#pragma once

#include "kernels/numbers.cuh"
#include "kernels/ptx/memory.cuh"
#include "kernels/sm90/schedules.h"

namespace mla_fp8::sm90 {

// Four values from `value` on as e4m3 of value * multiplier.
MLA_FP8_DEVICE u32 pack_e4m3(const float* value, float multiplier) {
  return e4m3x4(__fmul_rn(value[0], multiplier), __fmul_rn(value[1], multiplier), __fmul_rn(value[2], multiplier),
                __fmul_rn(value[3], multiplier));
}

// What every element of a launch becomes.
template <int kOutBytes>
struct Format {
  u8* out;
  float multiplier;  // of e4m3: 1 / out_scale
  bool is_one_byte;  // e4m3, where kOutBytes leaves it open
  bool is_fp16;      // else bf16, also of the activations

  MLA_FP8_DEVICE explicit Format(const Product& p)
      : out(static_cast<u8*>(p.out)),
        multiplier(1.0f),
        is_one_byte(kOutBytes == 0 ? p.out_dtype == Dtype::kE4m3 : kOutBytes == 1),
        is_fp16(p.x_dtype == Dtype::kFp16) {}

  // A division, so not before the first loads are on their way.
  MLA_FP8_DEVICE void read_scale(const Product& p) {
    if (kOutBytes != 2 && p.out_scale != nullptr) multiplier = __frcp_rn(*p.out_scale);
  }
};

// Stores kBytes (2, 4, 8 or 16) at once, first to leave L2; or element by element.
template <int kBytes, bool kAligned, int kElementBytes>
MLA_FP8_DEVICE void store_words(u8* to, const u32* word) {
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < kBytes / kElementBytes; ++i) {
      if constexpr (kElementBytes == 1) {
        to[i] = static_cast<u8>(word[i / 4] >> i % 4 * 8);
      } else {
        reinterpret_cast<u16*>(to)[i] = static_cast<u16>(word[i / 2] >> i % 2 * 16);
      }
    }
  } else if constexpr (kBytes == 2) {
    ptx::st_global_cs_b16(to, static_cast<u16>(word[0]));
  } else if constexpr (kBytes == 4) {
    ptx::st_global_cs_b32(to, word[0]);
  } else if constexpr (kBytes == 8) {
    ptx::st_global_cs_v2(to, make_uint2(word[0], word[1]));
  } else {
    static_assert(kBytes == 16);
    ptx::st_global_cs_v4(to, make_uint4(word[0], word[1], word[2], word[3]));
  }
}

// kCount neighbouring values to element `offset` of the output, if they exist: e4m3 after a multiplication.
template <bool kAligned, int kCount, int kOutBytes>
MLA_FP8_DEVICE void store_values(const Format<kOutBytes>& format, i64 offset, const float* value, float multiplier,
                                 bool exists) {
  if (kOutBytes != 2 && format.is_one_byte) {
    u32 word[(kCount + 3) / 4];
    if constexpr (kCount == 2) {
      word[0] = ptx::cvt_rn_satfinite_e4m3x2_f32(__fmul_rn(value[0], multiplier), __fmul_rn(value[1], multiplier));
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) word[i] = pack_e4m3(value + 4 * i, multiplier);
    }
    if (exists) store_words<kCount, kAligned, 1>(format.out + offset, word);
  } else if constexpr (kOutBytes != 1) {
    u32 word[kCount / 2];
    if (format.is_fp16) {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) word[i] = Fp16::pack(value[2 * i], value[2 * i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) word[i] = Bf16::pack(value[2 * i], value[2 * i + 1]);
    }
    if (exists) store_words<2 * kCount, kAligned, 2>(format.out + 2 * offset, word);
  }
}

// A row's values of a lane, at element `offset`: runs of kRun neighbours (weight_order.h).
template <bool kAligned, int kRun, int kValues, int kOutBytes>
MLA_FP8_DEVICE void store_row(const Format<kOutBytes>& format, i64 offset, const float (&value)[kValues],
                              float multiplier, bool exists, int quad) {
#pragma unroll
  for (int i = 0; i < kValues / kRun; ++i) {
    store_values<kAligned, kRun>(format, offset + kRun * (kQuad * i + quad), value + kRun * i, multiplier, exists);
  }
}

}  // namespace mla_fp8::sm90
