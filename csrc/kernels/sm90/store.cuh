// Stores: what becomes of the sums. 16-bit elements, or e4m3 by one scale or by a scale a row.
#pragma once

#include "kernels/numbers.cuh"
#include "kernels/ptx/memory.cuh"
#include "kernels/sm90/schedules.h"

namespace mla_fp8::sm90 {

// 16-bit elements of either format.
struct Bf16OrFp16 {
  static constexpr int kBytes = 2;
  bool is_fp16;

  template <int kCount>
  MLA_FP8_DEVICE void pack(const float* value, u32* word) const {
    if (is_fp16) {
      Fp16::pack<kCount>(value, word);
    } else {
      Bf16::pack<kCount>(value, word);
    }
  }
};

// Calls use(element) with what an output element is: E4m3, Bf16 or Fp16. It branches once, so that
// no store has to; without kOneFormat, 16-bit elements are Bf16OrFp16.
template <class Store, bool kOneFormat, class Use>
MLA_FP8_DEVICE void with_output(const Product& p, const Use& use) {
  const bool is_fp16 = Store::kFp16 && p.x_dtype == Dtype::kFp16;
  if (Store::kOutBytes == 1 || (Store::kOutBytes == 0 && p.out_dtype == Dtype::kE4m3)) {
    use(E4m3{});
  } else if constexpr (Store::kOutBytes != 1) {
    if constexpr (!kOneFormat) {
      use(Bf16OrFp16{is_fp16});
    } else if (is_fp16) {
      use(Fp16{});
    } else {
      use(Bf16{});
    }
  }
}

// 1 / out_scale, for e4m3 with one scale. It is a division, so it is called once the first loads
// are under way.
template <class Store>
MLA_FP8_DEVICE float read_multiplier(const Product& p) {
  return Store::kOutBytes != 2 && p.out_scale != nullptr ? __frcp_rn(*p.out_scale) : 1.0f;
}

// Four values from `value` on as e4m3 of value * multiplier.
MLA_FP8_DEVICE u32 pack_e4m3(const float* value, float multiplier) {
  return e4m3x4(__fmul_rn(value[0], multiplier), __fmul_rn(value[1], multiplier), __fmul_rn(value[2], multiplier),
                __fmul_rn(value[3], multiplier));
}

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

// Stores kCount neighbouring values from the output's element `at` on, if they exist. For e4m3 they
// are first multiplied by `multiplier`.
template <bool kAligned, int kCount, class Element>
MLA_FP8_DEVICE void store_values(Element element, void* out, i64 at, const float* value, float multiplier,
                                 bool exists) {
  constexpr int kBytes = kCount * Element::kBytes;
  u32 word[(kBytes + 3) / 4];
  if constexpr (Element::kBytes == 2) {
    element.template pack<kCount>(value, word);
  } else if constexpr (kCount == 2) {
    word[0] = ptx::cvt_rn_satfinite_e4m3x2_f32(__fmul_rn(value[0], multiplier), __fmul_rn(value[1], multiplier));
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) word[i] = pack_e4m3(value + 4 * i, multiplier);
  }
  if (exists) store_words<kBytes, kAligned, Element::kBytes>(static_cast<u8*>(out) + at * Element::kBytes, word);
}

// A lane's values of a row at the output's element `at`: runs of kRun neighbours (weight_order.h).
template <bool kAligned, int kRun, class Element, int kValues>
MLA_FP8_DEVICE void store_row(Element element, void* out, i64 at, const float (&value)[kValues], float multiplier,
                              bool exists, int quad) {
#pragma unroll
  for (int i = 0; i < kValues / kRun; ++i) {
    store_values<kAligned, kRun>(element, out, at + kRun * (kQuad * i + quad), value + kRun * i, multiplier, exists);
  }
}

}  // namespace mla_fp8::sm90
