// Operands swapped (swap AB), for few rows: weights are wgmma's A, 64 of their rows at a time, and the activations its B, whose 8, 16 or 32 rows are all
// there is to compute. So a thread keeps kTokens / 2 sums for 64 columns instead of 64 sums for 128, and a CTA so little that the next launch's CTAs
// fit beside it and bring their weights to L2 before griddepcontrol_wait. The sums have the bits of the other way round.
//
// Lane 4 g + t of warp w has rows 16 w + g + 8 e and columns 8 b + 2 t + {0, 1} of wgmma's D: sums 4 b + 2 e + {0, 1}. Row 16 w + 8 e + g of A's
// i-th tile is row L (8 w + g) + 2 i + e of the warpgroup's weights, L = 2 tiles: a lane's sums for a token are L neighbouring output columns.
// The tensor map sees the weights' rows as L g + e + 8 L w, dims [K, g, e, w, head].
#pragma once

#include "kernels/shared_rows.cuh"

namespace mla_fp8::few_rows {

inline constexpr int kTileRows = 64;  // of A: one wgmma
inline constexpr int kTileBytes = kTileRows * kGroup;

// One thread. The warpgroup's kTiles tiles, from weights' row `row` and column `column` on.
template <int kTiles>
MLA_FP8_DEVICE void load_weights(u8 (*to)[kTileBytes], const TensorMap* map, i32 column, i32 row, i32 head, u64* full) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    ptx::cp_async_bulk_tensor_5d(to[i], map, {column, 0, 2 * i, row / (16 * kTiles), head}, full);
}
template <int kTiles>
MLA_FP8_DEVICE void prefetch_weights(const TensorMap* map, i32 column, i32 row, i32 head) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    ptx::cp_async_bulk_prefetch_tensor_5d(map, {column, 0, 2 * i, row / (16 * kTiles), head});
}

template <int kTokens>
MLA_FP8_DEVICE void wgmma(float (&d)[kTokens / 2], u64 a, u64 b, bool accumulate) {
  static_assert(kTokens == 8 || kTokens == 16 || kTokens == 32);
  if constexpr (kTokens == 8) {
    ptx::wgmma_m64n8k32_f32_e4m3_e4m3_shared(d, a, b, accumulate);
  } else if constexpr (kTokens == 16) {
    ptx::wgmma_m64n16k32_f32_e4m3_e4m3_shared(d, a, b, accumulate);
  } else {
    ptx::wgmma_m64n32k32_f32_e4m3_e4m3_shared(d, a, b, accumulate);
  }
}

// d [64,kTokens] = a tile of weights times the rows' transpose over one group: between wgmma_fence and wgmma_commit_group.
template <int kTokens>
MLA_FP8_DEVICE void multiply(float (&d)[kTokens / 2], const u8* weights, const u8* rows) {
  const u64 a = weight_descriptor(weights);
  const u64 b = weight_descriptor(rows);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma<kTokens>(d, a + step * shared_rows::kStepDescriptor, b + step * shared_rows::kStepDescriptor, step != 0);
  }
}

struct Lane {
  int column;  // its first, of the warpgroup's
  int token;  // its first of every 8
};

template <int kTiles>
MLA_FP8_DEVICE Lane lane_of() {
  const int thread = threadIdx.x % (32 * kWarpgroupWarps);
  return {thread / kQuad * (2 * kTiles), thread % kQuad * 2};
}

// kCount neighbouring columns at `to`: bf16 or fp16 as they are, e4m3 after a multiplication.
template <int kOutBytes, int kCount>
MLA_FP8_DEVICE void store(u8* to, const float (&value)[kCount], float multiplier, bool is_fp16) {
  if constexpr (kOutBytes == 1 && kCount == 2) {
    ptx::st_global_cs_b16(
        to, ptx::cvt_rn_satfinite_e4m3x2_f32(__fmul_rn(value[0], multiplier), __fmul_rn(value[1], multiplier)));
  } else if constexpr (kOutBytes == 1 && kCount == 4) {
    ptx::st_global_cs_b32(to, pack_e4m3(value, multiplier));
  } else if constexpr (kOutBytes == 1) {
    static_assert(kCount == 8);
    ptx::st_global_cs_v2(to, make_uint2(pack_e4m3(value, multiplier), pack_e4m3(value + 4, multiplier)));
  } else {
    u32 word[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      word[i] = is_fp16 ? Fp16::pack(value[2 * i], value[2 * i + 1]) : Bf16::pack(value[2 * i], value[2 * i + 1]);
    }
    if constexpr (kCount == 2) {
      ptx::st_global_cs_b32(to, word[0]);
    } else if constexpr (kCount == 4) {
      ptx::st_global_cs_v2(to, make_uint2(word[0], word[1]));
    } else {
      static_assert(kCount == 8);
      ptx::st_global_cs_v4(to, make_uint4(word[0], word[1], word[2], word[3]));
    }
  }
}

}  // namespace mla_fp8::few_rows
