// Where a warpgroup's lanes keep a 64-row tile: wgmma's A fragment, its accumulators, and the way between these and 16-byte accesses.
//
// Lane 4 g + t of warp w has rows 16 w + g and 16 w + g + 8: a quad of lanes holds a whole row.
//   A, 32 columns     words {row, row + 8} x {columns 4 t.., columns 16 + 4 t..} in the order (0,0) (1,0) (0,1) (1,1), four e4m3 each
//   accumulators      for 8 columns 8 j..: 4 j + {0, 1} are columns 8 j + 2 t + {0, 1} of the row, 4 j + {2, 3} the same of row + 8
//   16-byte accesses  lane t has chunk t, t + 4, ... of the row's chunks of 16 bytes: the quad's are contiguous
// The ways between are fixed permutations inside a quad.
#pragma once

#include "kernels/numbers.cuh"
#include "kernels/ptx/memory.cuh"
#include "kernels/types.h"

namespace mla_fp8 {

inline constexpr int kVectorBytes = 16;  // one access of the aligned tiles
inline constexpr int kQuad = 4;  // lanes that hold a row
inline constexpr int kLaneRows = 2;  // rows of a lane
inline constexpr int kLaneRowStep = 8;  // between them
inline constexpr int kWgmmaK = 32;
inline constexpr int kGroup = 128;  // columns that share a scale
inline constexpr int kSteps = kGroup / kWgmmaK;  // wgmmas a group

struct LanePlace {
  int row;  // its first, of the tile's 64
  int quad;  // t
};

MLA_FP8_DEVICE LanePlace lane_place() {
  const int thread = threadIdx.x % 128;
  return {thread / 32 * 16 + thread % 32 / kQuad, thread % kQuad};
}

// A lane's share of one row's group: bf16 or fp16, as 16-byte accesses bring it.
struct RawRow {
  u32 word[kSteps][4];
};

// The A fragments of a 64x128 tile, and the scales of the lane's two rows.
struct Fragment {
  u32 a[kSteps][4];
  float scale[kLaneRows];
};

// 8 activations from `from`.
template <int kAlignBytes>
MLA_FP8_DEVICE void load_vector(u32 (&to)[4], const u16* from) {
  if constexpr (kAlignBytes == kVectorBytes) {
    ptx::ld_global_no_allocate_v4(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = from[2 * i] | static_cast<u32>(from[2 * i + 1]) << 16;
  }
}

MLA_FP8_DEVICE void load_shared(u32 (&to)[4], const void* from) {
  const uint4 vector = *static_cast<const uint4*>(from);
  to[0] = vector.x, to[1] = vector.y, to[2] = vector.z, to[3] = vector.w;
}

// 128 columns from `from`, zeros if the row is past the end.
template <int kAlignBytes>
MLA_FP8_DEVICE void load_row(RawRow& raw, const u16* from, bool exists, int quad) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (exists) {
      load_vector<kAlignBytes>(raw.word[step], from + step * kWgmmaK + quad * 8);
    } else {
#pragma unroll
      for (u32& word : raw.word[step]) word = 0;
    }
  }
}

// Lane t has chunks 2 t and 2 t + 1 of eight (`even` and `odd`) and gets chunks t and 4 + t.
MLA_FP8_DEVICE void spread_pairs(u32 even, u32 odd, int quad, u32& low, u32& high) {
  const int source = (quad & 1) << 1 | quad >> 1;
  const bool first_half = quad < 2;
  const u32 first = __shfl_sync(kFullWarp, first_half ? even : odd, source, kQuad);
  const u32 second = __shfl_sync(kFullWarp, first_half ? odd : even, source ^ 2, kQuad);
  low = (quad & 1) == 0 ? first : second;
  high = (quad & 1) == 0 ? second : first;
}

// word[i] of lane t becomes word[t] of lane i.
MLA_FP8_DEVICE void transpose_quad(u32 (&word)[4], int quad) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (quad & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const u32 kept = upper ? word[i | bit] : word[i];
      const u32 got = __shfl_xor_sync(kFullWarp, upper ? word[i] : word[i | bit], bit);
      word[i] = upper ? got : kept;
      word[i | bit] = upper ? kept : got;
    }
  }
}

// The row's largest magnitude, still as 16 bits. NaN wins.
MLA_FP8_DEVICE u32 row_amax_bits(const RawRow& raw) {
  u32 amax = 0;
#pragma unroll
  for (const auto& step : raw.word) {
#pragma unroll
    for (u32 word : step) amax = ptx::max_u16x2(amax, word & kMagnitudes);
  }
#pragma unroll
  for (int lanes = 1; lanes < kQuad; lanes *= 2) amax = ptx::max_u16x2(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
  return ptx::max_u16x2(amax, amax >> 16) & 0xffffu;
}

// Scale and e4m3 of a row, not yet where wgmma wants them. No shuffle in here: it stands in a branch.
template <class Element>
MLA_FP8_DEVICE float quantize_row_as(const RawRow& raw, u32 amax_bits, u32 (&packed)[kSteps][2]) {
  const float scale = group_scale(Element::low(amax_bits));
  const float multiplier = __frcp_rn(scale);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const u32(&word)[4] = raw.word[step];
    packed[step][0] = e4m3x4_scaled<Element>(word[0], word[1], multiplier);
    packed[step][1] = e4m3x4_scaled<Element>(word[2], word[3], multiplier);
  }
  return scale;
}

// Two rows of activations -> their A fragments: the 1x128 quantization of docs/numerics.md.
MLA_FP8_DEVICE void quantize(const RawRow (&raw)[kLaneRows], bool is_fp16, int quad, Fragment& fragment) {
  u32 packed[kLaneRows][kSteps][2];
  const u32 amax_bits[kLaneRows] = {row_amax_bits(raw[0]), row_amax_bits(raw[1])};
  if (is_fp16) {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) fragment.scale[i] = quantize_row_as<Fp16>(raw[i], amax_bits[i], packed[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) fragment.scale[i] = quantize_row_as<Bf16>(raw[i], amax_bits[i], packed[i]);
  }
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      spread_pairs(packed[i][step][0], packed[i][step][1], quad, fragment.a[step][i], fragment.a[step][2 + i]);
    }
  }
}

// A lane's 32 values of one row's 128 columns, out of the accumulators.
struct RowValues {
  float value[kGroup / kQuad];  // columns 8 j + 2 t + {0, 1} are 2 j + {0, 1}
};

MLA_FP8_DEVICE RowValues row_values(const float (&accumulators)[64], int row) {
  RowValues values;
#pragma unroll
  for (int i = 0; i < kGroup / kQuad; ++i) values.value[i] = accumulators[i / 2 * 4 + row * 2 + i % 2];
  return values;
}

// A lane's pairs of columns 8 j + 2 t + {0, 1}.
using PackedRow = u32[kGroup / 8];

template <class Element>
MLA_FP8_DEVICE void pack_row_as(PackedRow& packed, const RowValues& values) {
#pragma unroll
  for (int j = 0; j < kGroup / 8; ++j) packed[j] = Element::pack(values.value[2 * j], values.value[2 * j + 1]);
}

MLA_FP8_DEVICE void pack_row(PackedRow& packed, const RowValues& values, bool is_fp16) {
  if (is_fp16) {
    pack_row_as<Fp16>(packed, values);
  } else {
    pack_row_as<Bf16>(packed, values);
  }
}

// 128 columns of 16 bits. All lanes of a warp call it; rows that do not exist are not stored.
template <int kAlignBytes>
MLA_FP8_DEVICE void store_row_16bit(u16* to, const PackedRow& packed, bool exists, int quad) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // 32 columns
    u32 word[4] = {packed[4 * i], packed[4 * i + 1], packed[4 * i + 2], packed[4 * i + 3]};
    if constexpr (kAlignBytes == kVectorBytes) {
      transpose_quad(word, quad);
      if (exists) ptx::st_global_cs_v4(to + 32 * i + 8 * quad, make_uint4(word[0], word[1], word[2], word[3]));
    } else if (exists) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        u16* pair = to + 32 * i + 8 * j + 2 * quad;
        pair[0] = static_cast<u16>(word[j]);
        pair[1] = static_cast<u16>(word[j] >> 16);
      }
    }
  }
}

// 64 of the columns as e4m3 of value * multiplier, before lanes exchange them: columns 16 j + 2 t + {0, 1}, then 16 j + 8 + 2 t + {0, 1}.
MLA_FP8_DEVICE void e4m3_words(u32 (&word)[4], const RowValues& values, int half, float multiplier) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float* value = values.value + 16 * half + 4 * j;
    word[j] = e4m3x4(__fmul_rn(value[0], multiplier), __fmul_rn(value[1], multiplier), __fmul_rn(value[2], multiplier),
                     __fmul_rn(value[3], multiplier));
  }
}

// Columns 16 t.. of the 64. All lanes of a warp call it.
MLA_FP8_DEVICE uint4 e4m3_vector(const RowValues& values, int half, float multiplier, int quad) {
  u32 word[4];
  e4m3_words(word, values, half, multiplier);
  transpose_quad(word, quad);
  return make_uint4(__byte_perm(word[0], word[1], 0x5410), __byte_perm(word[2], word[3], 0x5410),
                    __byte_perm(word[0], word[1], 0x7632), __byte_perm(word[2], word[3], 0x7632));
}

// 128 columns as e4m3 of value * multiplier.
template <int kAlignBytes>
MLA_FP8_DEVICE void store_row_e4m3(u8* to, const RowValues& values, float multiplier, bool exists, int quad) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (kAlignBytes == kVectorBytes) {
      const uint4 vector = e4m3_vector(values, half, multiplier, quad);
      if (exists) ptx::st_global_cs_v4(to + 64 * half + 16 * quad, vector);
    } else if (exists) {
      u32 word[4];
      e4m3_words(word, values, half, multiplier);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
          to[64 * half + 16 * j + byte / 2 * 8 + 2 * quad + byte % 2] = static_cast<u8>(word[j] >> 8 * byte);
        }
      }
    }
  }
}

// 128 columns at element `offset` of an output: bf16 or fp16 as they are, e4m3 after a multiplication.
template <int kOutBytes, int kAlignBytes>
MLA_FP8_DEVICE void store_row(void* out, i64 offset, const RowValues& values, float multiplier, bool is_fp16,
                              bool exists, int quad) {
  if constexpr (kOutBytes == 1) {
    store_row_e4m3<kAlignBytes>(static_cast<u8*>(out) + offset, values, multiplier, exists, quad);
  } else {
    PackedRow packed;
    pack_row(packed, values, is_fp16);
    store_row_16bit<kAlignBytes>(static_cast<u16*>(out) + offset, packed, exists, quad);
  }
}

}  // namespace mla_fp8
