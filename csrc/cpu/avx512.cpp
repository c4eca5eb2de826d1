// AVX-512 (F, BW, DQ, VL): Skylake-X and later, Zen 4 and later.
#include "cpu/gemm.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
// GCC 12 warns of its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "cpu/tile.h"
#include "cpu/transpose.h"

namespace mla_fp8::cpu {
namespace {

struct Avx512 {
  using Reg = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRowTile = 6;  // 6 x 4 sums, 4 weights and 1 activation: 29 of 32 registers
  static constexpr int kNarrowRows = 6;
  static constexpr int kPanelRegs = 4;
  static constexpr int kWidth = kLanes * kPanelRegs;

  MLA_FP8_INLINE Reg load(const float* x) { return _mm512_loadu_ps(x); }
  MLA_FP8_INLINE void store(float* x, Reg v) { _mm512_storeu_ps(x, v); }
  MLA_FP8_INLINE Reg broadcast(float x) { return _mm512_set1_ps(x); }
  MLA_FP8_INLINE Reg add_product(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  MLA_FP8_INLINE Reg fused_multiply_add(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }

  MLA_FP8_INLINE __m512i unpack_low(__m512i a, __m512i b) { return _mm512_unpacklo_epi16(a, b); }
  MLA_FP8_INLINE __m512i unpack_high(__m512i a, __m512i b) { return _mm512_unpackhi_epi16(a, b); }

  // A register takes 32 codes of columns i and i + 8: its 128-bit lanes are k = 0..15 of each, then
  // k = 16..31 of each. After the transposition register i has all 16 columns, as pairs: of k = 2i
  // and 2i + 1 in its low half, of k = 2i + 16 and 2i + 17 in its high half.
  template <class Panel>
  MLA_FP8_INLINE void decode(const uint8_t* w, int64_t n_stride, const Ahead& ahead, typename Panel::Value* panel) {
    constexpr int64_t kLoad = 64;   // codes of one column
    constexpr int64_t kCodes = 32;  // of them in a register
    const __m512i lanes[2] = {_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                              _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15)};
    const __m512i half_mask = _mm512_set1_epi16(kE4m3AsFp16Mask);
    for (int64_t n = 0; n < kWidth; n += kGroupColumns) {
      __m512i largest = _mm512_setzero_si512();  // of code | 0x80, as unsigned bytes: 0xff is NaN
      for (int64_t k = 0; k < kScaleGroup; k += kCodes) {
        __m512i codes[kTransposeSize];
#pragma GCC unroll 8
        for (int i = 0; i < kTransposeSize; ++i) {
          const int64_t offset = (n + i) * n_stride + k / kLoad * kLoad;
          codes[i] = _mm512_permutex2var_epi64(_mm512_loadu_si512(w + offset), lanes[k % kLoad / kCodes],
                                               _mm512_loadu_si512(w + offset + kTransposeSize * n_stride));
          largest = _mm512_max_epu8(largest, _mm512_or_si512(codes[i], _mm512_set1_epi8(-128)));
          prefetch(ahead, offset + k % kLoad / kCodes * kTransposeSize * n_stride);
        }
        transpose_pairs<Avx512>(codes);
        auto* out = panel + k * kWidth + n;
#pragma GCC unroll 8
        for (int i = 0; i < kTransposeSize; ++i, out += 2 * kWidth) {
          const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(codes[i], 8), 1);
          const __m512i odd = _mm512_srai_epi16(codes[i], 1);
          Panel::store_rows(out, out + 16 * kWidth, _mm512_and_si512(even, half_mask));
          Panel::store_rows(out + kWidth, out + 17 * kWidth, _mm512_and_si512(odd, half_mask));
        }
      }
      if (_mm512_cmpeq_epi8_mask(largest, _mm512_set1_epi8(-1)) != 0) {
        patch_nan(w + n * n_stride, n_stride, kGroupColumns, kWidth, Panel::nan(), panel + n);
      }
    }
  }

  struct NarrowPanel {
    using Value = uint16_t;
    MLA_FP8_INLINE Value nan() { return kFp16Nan; }
    MLA_FP8_INLINE Reg load(const Value* panel, int64_t i) {
      return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + i * kLanes)));
    }
    MLA_FP8_INLINE void store_rows(Value* row, Value* row16, __m512i half) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256(half));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row16), _mm512_extracti64x4_epi64(half, 1));
    }
    MLA_FP8_INLINE void decode(const uint8_t* w, int64_t n_stride, const Ahead& ahead, Value* panel) {
      Avx512::decode<NarrowPanel>(w, n_stride, ahead, panel);
    }
  };

  struct WidePanel {
    using Value = float;
    MLA_FP8_INLINE Value nan() { return float_of(kFp32Nan); }
    MLA_FP8_INLINE Reg load(const Value* panel, int64_t i) { return Avx512::load(panel + i * kLanes); }
    MLA_FP8_INLINE void store_rows(Value* row, Value* row16, __m512i half) {
      Avx512::store(row, _mm512_cvtph_ps(_mm512_castsi512_si256(half)));
      Avx512::store(row16, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)));
    }
    MLA_FP8_INLINE void decode(const uint8_t* w, int64_t n_stride, const Ahead& ahead, Value* panel) {
      Avx512::decode<WidePanel>(w, n_stride, ahead, panel);
    }
  };
};

}  // namespace

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = {"avx512", run_tile<Avx512>, quantize_rows};
  return &kernels;
}

}  // namespace mla_fp8::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace mla_fp8::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace mla_fp8::cpu

#endif
