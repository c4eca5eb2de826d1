// AVX2 with FMA and F16C: Haswell and later, every Zen.
#include "cpu/gemm.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/tile.h"
#include "cpu/transpose.h"

namespace mla_fp8::cpu {
namespace {

struct Avx2 {
  using Reg = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kRowTile = 6;  // 6 x 2 sums, 2 weights and 1 activation: 15 of 16 registers
  static constexpr int kNarrowRows = 6;
  static constexpr int kPanelRegs = 2;
  static constexpr int kWidth = kLanes * kPanelRegs;
  static constexpr int kPrefetches = 4;  // cache lines of the next weights, in each of 8 steps

  MLA_FP8_INLINE Reg load(const float* x) { return _mm256_loadu_ps(x); }
  MLA_FP8_INLINE void store(float* x, Reg v) { _mm256_storeu_ps(x, v); }
  MLA_FP8_INLINE Reg broadcast(float x) { return _mm256_set1_ps(x); }
  MLA_FP8_INLINE Reg add_product(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  MLA_FP8_INLINE Reg fused_multiply_add(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }

  MLA_FP8_INLINE __m256i unpack_low(__m256i a, __m256i b) { return _mm256_unpacklo_epi16(a, b); }
  MLA_FP8_INLINE __m256i unpack_high(__m256i a, __m256i b) { return _mm256_unpackhi_epi16(a, b); }

  MLA_FP8_INLINE __m128i load_codes(const uint8_t* w) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(w)); }

  // A register takes 16 codes of columns i and i + 8, one in each 128-bit lane. After the
  // transposition register i has all 16 columns of k = 2i and 2i + 1, as pairs.
  template <class Panel>
  MLA_FP8_INLINE void decode(const uint8_t* w, int64_t n_stride, const Ahead& ahead, typename Panel::Value* panel) {
    constexpr int64_t kCodes = 16;  // of one column in a register
    static_assert(kWidth == kGroupColumns);
    const __m256i half_mask = _mm256_set1_epi16(kE4m3AsFp16Mask);
    __m256i largest = _mm256_setzero_si256();  // of code | 0x80, as unsigned bytes: 0xff is NaN
    for (int64_t k = 0; k < kScaleGroup; k += kCodes) {
      __m256i codes[kTransposeSize];
#pragma GCC unroll 8
      for (int i = 0; i < kTransposeSize; ++i) {
        const uint8_t* column = w + i * n_stride + k;
        codes[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load_codes(column)),
                                           load_codes(column + kTransposeSize * n_stride), 1);
        largest = _mm256_max_epu8(largest, _mm256_or_si256(codes[i], _mm256_set1_epi8(-128)));
      }
#pragma GCC unroll 4
      for (int i = 0; i < kPrefetches; ++i) {
        const int64_t line = k / kCodes * kPrefetches + i;
        prefetch(ahead, line / 2 * n_stride + line % 2 * kCacheLineBytes);
      }
      transpose_pairs<Avx2>(codes);
      auto* out = panel + k * kWidth;
#pragma GCC unroll 8
      for (int i = 0; i < kTransposeSize; ++i, out += 2 * kWidth) {
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(codes[i], 8), 1);
        const __m256i odd = _mm256_srai_epi16(codes[i], 1);
        Panel::store_row(out, _mm256_and_si256(even, half_mask));
        Panel::store_row(out + kWidth, _mm256_and_si256(odd, half_mask));
      }
    }
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, _mm256_set1_epi8(-1))) != 0) {
      patch_nan(w, n_stride, kWidth, kWidth, Panel::nan(), panel);
    }
  }

  struct NarrowPanel {
    using Value = uint16_t;
    MLA_FP8_INLINE Value nan() { return kFp16Nan; }
    MLA_FP8_INLINE Reg load(const Value* panel, int64_t i) {
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + i * kLanes)));
    }
    MLA_FP8_INLINE void store_row(Value* row, __m256i half) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), half);
    }
    MLA_FP8_INLINE void decode(const uint8_t* w, int64_t n_stride, const Ahead& ahead, Value* panel) {
      Avx2::decode<NarrowPanel>(w, n_stride, ahead, panel);
    }
  };

  struct WidePanel {
    using Value = float;
    MLA_FP8_INLINE Value nan() { return float_of(kFp32Nan); }
    MLA_FP8_INLINE Reg load(const Value* panel, int64_t i) { return Avx2::load(panel + i * kLanes); }
    MLA_FP8_INLINE void store_row(Value* row, __m256i half) {
      Avx2::store(row, _mm256_cvtph_ps(_mm256_castsi256_si128(half)));
      Avx2::store(row + kLanes, _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)));
    }
    MLA_FP8_INLINE void decode(const uint8_t* w, int64_t n_stride, const Ahead& ahead, Value* panel) {
      Avx2::decode<WidePanel>(w, n_stride, ahead, panel);
    }
  };
};

}  // namespace

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = {"avx2", run_tile<Avx2>, quantize_rows};
  return &kernels;
}

}  // namespace mla_fp8::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace mla_fp8::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace mla_fp8::cpu

#endif
