// Where a warpgroup's lanes keep a 64-row tile: wgmma's A fragment, its accumulators, and what they read and write of a row.
//
// Lane 4 g + t of warp w has rows 16 w + g and 16 w + g + 8: a quad of lanes holds a whole row.
//   A, 32 columns     words {row, row + 8} x {columns 4 t.., columns 16 + 4 t..} in the order (0,0) (1,0) (0,1) (1,1), four e4m3 each
//   activations       columns 4 t.. and 16 + 4 t.. of every 32, in 8-byte accesses: what the lane's A words are made of
//   accumulators      for 8 wgmma columns 8 j..: 4 j + {0, 1} are columns 8 j + 2 t + {0, 1} of the row, 4 j + {2, 3} the same of row + 8
//   outputs           wgmma column 4 L i + 8 j + 2 t + e, j < L / 2, is the tile's column 4 L i + L t + 2 j + e: a lane's values are runs of L
//                     neighbours, L = 16 bytes' worth. The copy engine brings the weights in that order (weights.cuh).
// So nothing is exchanged between lanes on the way from activations to outputs but a row's amax.
#pragma once

#include "kernels/lanes.h"
#include "kernels/numbers.cuh"
#include "kernels/ptx/memory.cuh"
#include "kernels/types.h"

namespace mla_fp8 {

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

// A lane's share of one row's group, bf16 or fp16: of 32 columns the words of 4 t.., then those of 16 + 4 t...
struct RawRow {
  u32 word[kSteps][4];
};

// The A fragments of a 64x128 tile, and the scales of the lane's two rows.
struct Fragment {
  u32 a[kSteps][4];
  float scale[kLaneRows];
};

inline constexpr int kHalfStep = kWgmmaK / 2;

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

// 4 activations from `from`.
template <int kAlignBytes>
MLA_FP8_DEVICE void load_half_vector(u32* to, const u16* from) {
  if constexpr (kAlignBytes == kVectorBytes) {
    ptx::ld_global_no_allocate_v2(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) to[i] = from[2 * i] | static_cast<u32>(from[2 * i + 1]) << 16;
  }
}

MLA_FP8_DEVICE void load_shared(u32 (&to)[4], const void* from) {
  const uint4 vector = *static_cast<const uint4*>(from);
  to[0] = vector.x, to[1] = vector.y, to[2] = vector.z, to[3] = vector.w;
}
MLA_FP8_DEVICE void load_shared_half(u32* to, const void* from) {
  const uint2 vector = *static_cast<const uint2*>(from);
  to[0] = vector.x, to[1] = vector.y;
}

// 128 columns from `from`, zeros if the row is past the end.
template <int kAlignBytes>
MLA_FP8_DEVICE void load_row(RawRow& raw, const u16* from, bool exists, int quad) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (exists) {
        load_half_vector<kAlignBytes>(raw.word[step] + 2 * half, from + step * kWgmmaK + half * kHalfStep + quad * 4);
      } else {
        raw.word[step][2 * half] = raw.word[step][2 * half + 1] = 0;
      }
    }
  }
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

// Scale and e4m3 of a row. No shuffle in here: it stands in a branch.
template <class Element>
MLA_FP8_DEVICE float quantize_row_as(const RawRow& raw, u32 amax_bits, u32 (&packed)[kSteps][2]) {
  const float scale = group_scale(Element::low(amax_bits));
  const float multiplier = group_multiplier(scale);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const u32(&word)[4] = raw.word[step];
    packed[step][0] = e4m3x4_scaled<Element>(word[0], word[1], multiplier);
    packed[step][1] = e4m3x4_scaled<Element>(word[2], word[3], multiplier);
  }
  return scale;
}

// Two rows of activations -> their A fragments: the 1x128 quantization of docs/numerics.md.
MLA_FP8_DEVICE void quantize(const RawRow (&raw)[kLaneRows], bool is_fp16, Fragment& fragment) {
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
      fragment.a[step][i] = packed[i][step][0];
      fragment.a[step][2 + i] = packed[i][step][1];
    }
  }
}

// A lane's 32 values of one row's 128 columns, out of the accumulators: value[L i + c] is column 4 L i + L t + c.
struct RowValues {
  float value[kGroup / kQuad];
};

MLA_FP8_DEVICE RowValues row_values(const float (&accumulators)[64], int row) {
  RowValues values;
#pragma unroll
  for (int i = 0; i < kGroup / kQuad; ++i) values.value[i] = accumulators[i / 2 * 4 + row * 2 + i % 2];
  return values;
}

// 8 values from `value` on as bf16 or fp16.
template <class Element>
MLA_FP8_DEVICE uint4 pack_16bit_as(const float* value) {
  return make_uint4(Element::pack(value[0], value[1]), Element::pack(value[2], value[3]),
                    Element::pack(value[4], value[5]), Element::pack(value[6], value[7]));
}
MLA_FP8_DEVICE uint4 pack_16bit(const float* value, bool is_fp16) {
  return is_fp16 ? pack_16bit_as<Fp16>(value) : pack_16bit_as<Bf16>(value);
}

// Four values from `value` on as e4m3 of value * multiplier.
MLA_FP8_DEVICE u32 pack_e4m3(const float* value, float multiplier) {
  return e4m3x4(__fmul_rn(value[0], multiplier), __fmul_rn(value[1], multiplier), __fmul_rn(value[2], multiplier),
                __fmul_rn(value[3], multiplier));
}

// 128 columns at element `offset` of an output, if the row exists: bf16 or fp16 as they are, e4m3 after a multiplication.
template <int kOutBytes, int kAlignBytes>
MLA_FP8_DEVICE void store_row(void* out, i64 offset, const RowValues& values, float multiplier, bool is_fp16,
                              bool exists, int quad) {
  constexpr int kColumns = kLaneColumns<kOutBytes>;
#pragma unroll
  for (int i = 0; i < kGroup / (kQuad * kColumns); ++i) {
    const float* value = values.value + kColumns * i;
    uint4 vector;
    if constexpr (kOutBytes == 1) {
      vector = make_uint4(pack_e4m3(value, multiplier), pack_e4m3(value + 4, multiplier),
                          pack_e4m3(value + 8, multiplier), pack_e4m3(value + 12, multiplier));
    } else {
      vector = pack_16bit(value, is_fp16);
    }
    if (!exists) continue;
    const i64 at = offset + kColumns * (kQuad * i + quad);
    if constexpr (kAlignBytes == kVectorBytes) {
      ptx::st_global_cs_v4(static_cast<u8*>(out) + at * kOutBytes, vector);
    } else {
      const u32 word[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if constexpr (kOutBytes == 1) {
          static_cast<u8*>(out)[at + j] = static_cast<u8>(word[j / 4] >> j % 4 * 8);
        } else {
          static_cast<u16*>(out)[at + j] = static_cast<u16>(word[j / 2] >> j % 2 * 16);
        }
      }
    }
  }
}

}  // namespace mla_fp8
