// AMX: Sapphire Rapids and later. Exact activations are multiplied as bf16, in tiles of 16 x 32 by
// 32 x 16; FP8 activations are AVX-512's.
//
//     sums[s,n]  = sum over a block's k of x[s,k] * w[n,k]     x / a_scale: 1 bf16 term, or 2 of fp16
//     acc[s,n]  += sums[s,n] * (a_scale[s] * w_scale)          fma; over blocks ascending
//
// Numerics. All terms are exact: an e4m3 value is a bf16, and an fp16 is the sum of two, of which
// the lesser one goes first. tdpbf16ps adds 32 products to a sum: those of even k ascending to
// zero, by fma, those of odd k likewise, then both of these, then the sum (Intel's manual; 512,000
// sums on a Sapphire Rapids had these bits). That is another order than tile.h's, so the bits are
// others than AVX-512's, for all S alike. It rounds to nearest, and takes and gives subnormals as
// zero: what is lost is below 2^-117 in units of a_scale, where the group's largest value is 2^-32
// or more.
//
// Cost. 16 cycles for 16 rows x 16 columns x 32 k, be it one row or sixteen; less than 0.2 cycles
// to decode a weight. A tile's sums reach memory some 60 cycles after its last product, and what
// was stored has to reach the cache before a tile loads it. Therefore both are done meanwhile:
// while tiles multiply, the sums before are accumulated and the next panel is decoded. Activations
// of the next rows are prefetched too: at S = 128 that is worth 5% of v_up's time.
#include "cpu/gemm.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")
// GCC 12 warns of its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "cpu/tile.h"

namespace mla_fp8::cpu {
namespace {

constexpr int64_t kTileRows = 16;      // of an AMX tile, at most
constexpr int64_t kTileRowBytes = 64;  // 16 fp32, or 32 bf16
constexpr int64_t kTileColumns = 16;   // of sums
constexpr int64_t kTileK = 32;
constexpr int64_t kTileSteps = kScaleGroup / kTileK;
constexpr int64_t kTileValues = kTileRows * kTileK;  // of a tile of weights: pairs of k x columns
constexpr int64_t kMaxTerms = 2;                     // bf16 terms of an activation

struct Amx {
  static constexpr int kLanes = kTileColumns;
  static constexpr int kPanelRegs = 4;  // tiles side by side
};
constexpr int64_t kWidth = kPanelWidth<Amx>;
static_assert(kPaddingRows >= kTileRows);
static_assert(kMaxTerms * sizeof(uint16_t) <= sizeof(float));  // a value's place in scratch.a
static_assert(2 * kScaleGroup * kWidth * sizeof(uint16_t) <= sizeof(Scratch::panel));

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// An instruction each. GCC 12's own do not say that a tile reads memory.
MLA_FP8_INLINE void ldtilecfg(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
MLA_FP8_INLINE void tilerelease() { asm volatile("tilerelease"); }
template <int kTile>
MLA_FP8_INLINE void tilezero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
MLA_FP8_INLINE void tileloadd(const void* rows, int64_t stride_bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(rows), "r"(stride_bytes) : "memory");
}
template <int kTile>
MLA_FP8_INLINE void tilestored(void* rows, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(rows), "r"(stride_bytes) : "memory");
}
template <int kSum, int kA, int kB>
MLA_FP8_INLINE void tdpbf16ps() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

// The bytes of the bf16 that each e4m3 magnitude is; NaN is one.
struct alignas(64) WeightTable {
  uint8_t low[128], high[128];

  WeightTable() {
    for (int code = 0; code < 128; ++code) {
      const uint16_t value = float_to_bf16(e4m3_to_float(static_cast<uint8_t>(code)));
      low[code] = static_cast<uint8_t>(value);
      high[code] = static_cast<uint8_t>(value >> 8);
    }
  }
};

// 16 codes of each of four columns.
MLA_FP8_INLINE __m512i load_lanes(const uint8_t* w, int64_t stride) {
  __m512i x = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  x = _mm512_mask_broadcast_i32x4(x, 0x00f0, _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + stride)));
  x = _mm512_mask_broadcast_i32x4(x, 0x0f00, _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 2 * stride)));
  return _mm512_mask_broadcast_i32x4(x, 0xf000, _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 3 * stride)));
}

// e4m3 [16][16] to bf16, half a tile: its row i has the columns' pairs of k = 2i and 2i + 1. In
// 128-bit lane j are columns 4j to 4j + 3. Two rounds of interleaving bring their 16-bit pairs of
// codes together, eight bytes a k, and interleaving the bytes of the values makes a row of those.
MLA_FP8_INLINE void decode_half_tile(const uint8_t* w, int64_t n_stride, const WeightTable& table, uint16_t* out) {
  constexpr int kOrOfAnd = 0xf8;  // a | (b & c)
  const __m512i sign = _mm512_set1_epi8(-128);
  __m512i x[4], y[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = load_lanes(w + i * n_stride, 4 * n_stride);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    y[2 * i] = _mm512_unpacklo_epi16(x[i], x[i + 2]);
    y[2 * i + 1] = _mm512_unpackhi_epi16(x[i], x[i + 2]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    x[2 * i] = _mm512_unpacklo_epi16(y[i], y[i + 2]);
    x[2 * i + 1] = _mm512_unpackhi_epi16(y[i], y[i + 2]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, out += kTileRowBytes) {
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table.low), x[i], _mm512_load_si512(table.low + 64));
    const __m512i magnitude =
        _mm512_permutex2var_epi8(_mm512_load_si512(table.high), x[i], _mm512_load_si512(table.high + 64));
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, x[i], sign, kOrOfAnd);
    _mm512_store_si512(out, _mm512_unpacklo_epi8(low, high));
    _mm512_store_si512(out + kTileRowBytes / 2, _mm512_unpackhi_epi8(low, high));
  }
}

// A step of a panel: e4m3 [width][32] to bf16 tiles, [n / 16].
MLA_FP8_INLINE void decode_step(const uint8_t* w, int64_t n_stride, const Ahead& ahead, const WeightTable& table,
                                int64_t step, uint16_t* tiles) {
  constexpr int64_t kHalves = 2 * Amx::kPanelRegs;
  constexpr int64_t kColumnsAhead = kWidth / kTileSteps / kHalves;
  for (int64_t half = 0; half < kHalves; ++half) {
    const int64_t n = half / 2 * kTileColumns, k = step * kTileK + half % 2 * kTileK / 2;
    const int64_t column = (step * kHalves + half) * kColumnsAhead;
    for (int64_t i = 0; i < kColumnsAhead; ++i) {
      prefetch(ahead, (column + i) * n_stride);
      prefetch(ahead, (column + i) * n_stride + kCacheLineBytes);
    }
    decode_half_tile(w + n * n_stride + k, n_stride, table, tiles + half * kTileValues / 2);
  }
}

// 128 activations to bf16, [term][k], the greater term first; returns their scale. Of fp16 values
// that one has the upper 8 bits of 11, and the rest is a bf16 too.
MLA_FP8_INLINE float split_group(const void* in, Dtype dtype, uint16_t* out) {
  float x[kScaleGroup];
  load_row(in, dtype, kScaleGroup, x);
  const float scale = range_scale(x);
  const float factor = 1.0f / scale;
  for (int64_t k = 0; k < kScaleGroup; ++k) {
    x[k] *= factor;
    out[k] = static_cast<uint16_t>(bits_of(x[k]) >> 16);
  }
  if (dtype == Dtype::kBf16) return scale;
  for (int64_t k = 0; k < kScaleGroup; ++k) {
    out[kScaleGroup + k] = static_cast<uint16_t>(bits_of(x[k] - bf16_to_float(out[k])) >> 16);
  }
  return scale;
}

// The same, at once where the scale of bf16 values is 1.
MLA_FP8_INLINE float take_group(const void* in, Dtype dtype, uint16_t* out) {
  if (dtype != Dtype::kBf16) return split_group(in, dtype, out);
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i x[4], largest = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_loadu_si512(static_cast<const uint16_t*>(in) + i * kTileK);
    largest = _mm512_max_epu16(largest, _mm512_and_si512(x[i], magnitude));
  }
  const auto any_from = [&](uint32_t exponent) {
    return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(static_cast<int16_t>(exponent << kBf16MantissaBits)));
  };
  if (any_from(kLeastExponent) == 0 || any_from(kMostExponent + 1) != 0) return split_group(in, dtype, out);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) _mm512_storeu_si512(out + i * kTileK, x[i]);
  return 1.0f;
}

// A block's sums of some rows and a panel's columns, on their way to acc.
struct Sums {
  const float* values;  // [row][width]
  const float* a_scale;
  float* acc;
  int64_t rows, acc_stride;
  float w_scale;
  bool first;
};

// Adds the rows [begin, end), those that there are.
MLA_FP8_INLINE void accumulate(const Sums& sums, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end && r < sums.rows; ++r) {
    const __m512 scale = _mm512_set1_ps(sums.a_scale[r] * sums.w_scale);
    float* acc = sums.acc + r * sums.acc_stride;
#pragma GCC unroll 4
    for (int64_t n = 0; n < kWidth; n += kTileColumns) {
      const __m512 before = sums.first ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + n);
      _mm512_storeu_ps(acc + n, _mm512_fmadd_ps(_mm512_load_ps(sums.values + r * kWidth + n), scale, before));
    }
  }
}

// values [16][width] = a [16][term][128] . panel, the lesser term first. `meanwhile` is called with
// each step.
template <class Meanwhile>
MLA_FP8_INLINE void multiply_tiles(const uint16_t* a, int64_t terms, const uint16_t* panel, float* values,
                                   const Meanwhile& meanwhile) {
  static_assert(Amx::kPanelRegs == 4);
  tilezero<0>(), tilezero<1>(), tilezero<2>(), tilezero<3>();
  for (int64_t term = terms - 1; term >= 0; --term) {
    for (int64_t step = 0; step < kTileSteps; ++step) {
      const uint16_t* b = panel + step * Amx::kPanelRegs * kTileValues;
      tileloadd<4>(a + term * kScaleGroup + step * kTileK, terms * kScaleGroup * sizeof(uint16_t));
      tileloadd<5>(b, kTileRowBytes), tdpbf16ps<0, 4, 5>();
      tileloadd<6>(b + kTileValues, kTileRowBytes), tdpbf16ps<1, 4, 6>();
      tileloadd<5>(b + 2 * kTileValues, kTileRowBytes), tdpbf16ps<2, 4, 5>();
      tileloadd<6>(b + 3 * kTileValues, kTileRowBytes), tdpbf16ps<3, 4, 6>();
      if (term == 0) meanwhile(step);
    }
  }
  tilestored<0>(values, kWidth * sizeof(float));
  tilestored<1>(values + kTileColumns, kWidth * sizeof(float));
  tilestored<2>(values + 2 * kTileColumns, kWidth * sizeof(float));
  tilestored<3>(values + 3 * kTileColumns, kWidth * sizeof(float));
}

// Tiles 0 to 3 are sums, 4 is activations, 5 and 6 are weights.
MLA_FP8_INLINE void configure_tiles(int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < 7; ++tile) {
    config.row_bytes[tile] = kTileRowBytes;
    config.rows[tile] = static_cast<uint8_t>(tile < 5 ? rows : kTileRows);
  }
  ldtilecfg(config);
}

// Part `part` of `parts` of rows [begin, end) of those that most likely come next, into L2.
MLA_FP8_INLINE void prefetch_next_rows(const Product& product, const TileRange& range, int64_t begin, int64_t end,
                                       int64_t part, int64_t parts) {
  const bool same_head = range.row_end < product.s;
  const int64_t row = same_head ? range.row_end : 0;
  const int64_t head = same_head || range.head + 1 == product.heads ? range.head : range.head + 1;
  const int64_t lines = product.k * bytes_per_element(product.x_dtype) / kCacheLineBytes;
  for (int64_t r = row + begin; r < row + end && r < product.s; ++r) {
    const auto* in = static_cast<const char*>(
        element(product.x, product.x_dtype, head * product.x_stride[1] + r * product.x_stride[0]));
    for (int64_t line = part * lines / parts; line < (part + 1) * lines / parts; ++line) {
      __builtin_prefetch(in + line * kCacheLineBytes, 0, 2);
    }
  }
}

void run_exact(const Product& product, const TileRange& range, Scratch& scratch) {
  static const WeightTable table;
  const int64_t rows = range.row_end - range.row_begin;
  const int64_t columns = range.n_end - range.n_begin;
  const int64_t blocks = product.k / kScaleGroup;
  const int64_t steps = blocks * (columns / kWidth);
  const int64_t terms = product.x_dtype == Dtype::kFp16 ? 2 : 1;
  const bool keep_blocks = rows * blocks <= kMaxBlocks * kScratchRows;
  const int64_t tile_rows = (rows + (rows - 1) / kTileRows) / ((rows - 1) / kTileRows + 1);
  auto* a = reinterpret_cast<uint16_t*>(scratch.a);
  auto* panels = reinterpret_cast<uint16_t*>(scratch.panel);
  const auto panel = [=](int64_t i) { return panels + i % 2 * kScaleGroup * kWidth; };
  const auto take_rows = [&](int64_t p_begin, int64_t p_end) {
    each_group(product, range, p_begin, p_end, [&](const void* in, int64_t, int64_t, int64_t slot) {
      scratch.a_scale[slot] = take_group(in, product.x_dtype, a + slot * terms * kScaleGroup);
    });
  };
  const auto decode = [&](int64_t i, int64_t step) {
    const Ahead ahead = {weights_at<Amx>(product, range, i + 1, keep_blocks),
                         weights_at<Amx>(product, range, i + kStepsAhead, keep_blocks)};
    decode_step(weights_at<Amx>(product, range, i, keep_blocks), product.w_stride[1], ahead, table, step,
                panel(i) + step * Amx::kPanelRegs * kTileValues);
  };
  alignas(64) float values[2][kTileRows * kWidth];
  Sums before{};  // of no rows
  int64_t tile = 0;
  configure_tiles(tile_rows);
  if (keep_blocks) take_rows(0, blocks);
  for (int64_t step = 0; step < kTileSteps; ++step) decode(0, step);
  for (int64_t i = 0; i < steps; ++i) {
    const Step at = step_at<Amx>(i, blocks, columns / kWidth, keep_blocks);
    if (!keep_blocks && at.column == 0) {
      accumulate(before, 0, kTileRows);  // with the scales of the block before
      before.rows = 0;
      take_rows(at.p, at.p + 1);
    }
    const float w_scale = weight_scale(product, range.head, range.n_begin + at.column, at.p);
    for (int64_t row = 0; row < rows; row += tile_rows, ++tile) {
      const int64_t slot = (keep_blocks ? at.p * rows : 0) + row;
      const bool decodes = row + tile_rows >= rows && i + 1 < steps;
      multiply_tiles(a + slot * terms * kScaleGroup, terms, panel(i), values[tile % 2], [&](int64_t step) {
        const int64_t begin = step * kTileRows / kTileSteps, end = (step + 1) * kTileRows / kTileSteps;
        accumulate(before, begin, end);
        prefetch_next_rows(product, range, row + begin, row + end, i, steps);
        if (decodes) decode(i + 1, step);
      });
      before = {values[tile % 2],
                scratch.a_scale + slot,
                scratch.acc + row * columns + at.column,
                rows - row < tile_rows ? rows - row : tile_rows,
                columns,
                w_scale,
                at.p == 0};
    }
  }
  accumulate(before, 0, kTileRows);
  tilerelease();
  store_tile(product, range, scratch);
  store_pe(product, range);
}

void run_any(const Product& product, const TileRange& range, Scratch& scratch) {
  if (product.terms > 1) {
    run_exact(product, range, scratch);
  } else {
    avx512_kernels()->run_tile(product, range, scratch);
  }
}

}  // namespace

const Kernels* amx_kernels() {
  static constexpr Kernels kernels = {"amx", run_any, quantize_rows};
  return &kernels;
}

}  // namespace mla_fp8::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace mla_fp8::cpu {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace mla_fp8::cpu

#endif
