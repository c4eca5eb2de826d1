// absorb_q's last columns: q_pe copied, or quantized, beside the latent.
#pragma once

#include "kernels/absorb_q.h"
#include "kernels/fragment.cuh"
#include "kernels/types.h"

namespace mla_fp8::absorb_q {

// One 16-byte chunk of q_pe: 8 columns.
struct PeChunk {
  u32 word[4];
  i64 row;
  i32 column;
  bool exists;
};

// Chunk `index` of the kRows rows from first_row on.
template <int kRows = kWarpgroupM>
MLA_FP8_DEVICE PeChunk pe_chunk(const Params& p, i64 first_row, i32 index) {
  constexpr i32 kUsualPe = 64;
  const u32 chunks = static_cast<u32>(p.pe) / 8;
  const i32 row =
      static_cast<i32>(p.pe == kUsualPe ? static_cast<u32>(index) / (kUsualPe / 8) : static_cast<u32>(index) / chunks);
  PeChunk chunk;
  chunk.row = first_row + row;
  chunk.column = (index - row * static_cast<i32>(chunks)) * 8;
  chunk.exists = row < kRows && chunk.row < p.s;
  return chunk;
}

MLA_FP8_DEVICE const u16* pe_source(const Params& p, const PeChunk& chunk, i64 head) {
  return p.q_pe + chunk.row * p.q_pe_stride[0] + head * p.q_pe_stride[1] + chunk.column;
}

template <int kAlignBytes, int kRows = kWarpgroupM>
MLA_FP8_DEVICE PeChunk load_pe(const Params& p, i64 first_row, i64 head, i32 index) {
  PeChunk chunk = pe_chunk<kRows>(p, first_row, index);
  if (chunk.exists) load_vector<kAlignBytes>(chunk.word, pe_source(p, chunk, head));
  return chunk;
}

template <class Element>
MLA_FP8_DEVICE uint2 pe_e4m3(const PeChunk& chunk, float multiplier) {
  return make_uint2(e4m3x4_scaled<Element>(chunk.word[0], chunk.word[1], multiplier),
                    e4m3x4_scaled<Element>(chunk.word[2], chunk.word[3], multiplier));
}

template <int kOutBytes, int kAlignBytes>
MLA_FP8_DEVICE void store_pe(const Params& p, const PeChunk& chunk, i64 head, float multiplier) {
  if (!chunk.exists) return;
  const i64 offset = chunk.row * p.q_stride[0] + head * p.q_stride[1] + p.r + chunk.column;
  if constexpr (kOutBytes == 1) {
    const uint2 words = p.is_fp16 ? pe_e4m3<Fp16>(chunk, multiplier) : pe_e4m3<Bf16>(chunk, multiplier);
    u8* to = static_cast<u8*>(p.q) + offset;
    if constexpr (kAlignBytes == kVectorBytes) {
      ptx::st_global_cs_v2(to, words);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[i] = static_cast<u8>(words.x >> 8 * i);
        to[i + 4] = static_cast<u8>(words.y >> 8 * i);
      }
    }
  } else {
    u16* to = static_cast<u16*>(p.q) + offset;
    if constexpr (kAlignBytes == kVectorBytes) {
      ptx::st_global_cs_v4(to, make_uint4(chunk.word[0], chunk.word[1], chunk.word[2], chunk.word[3]));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[2 * i] = static_cast<u16>(chunk.word[i]);
        to[2 * i + 1] = static_cast<u16>(chunk.word[i] >> 16);
      }
    }
  }
}

// The column tiles of a head share its q_pe columns: slice i of n takes chunks kThreads (i + j n) + thread of every 64 rows, j = 0, 1, ...
template <int kThreads>
MLA_FP8_DEVICE i32 pe_index(i32 slice, i32 slices, i32 j) {
  return (slice + j * slices) * kThreads + static_cast<i32>(threadIdx.x % kThreads);
}

// From the j-th chunk on, without a stage.
template <int kOutBytes, int kAlignBytes, int kThreads, int kRows = kWarpgroupM>
MLA_FP8_DEVICE void copy_pe(const Params& p, i64 first_row, i64 head, i32 slice, i32 slices, i32 j, float multiplier) {
  for (; (slice + j * slices) * kThreads < kRows * (p.pe / 8); ++j) {
    store_pe<kOutBytes, kAlignBytes>(
        p, load_pe<kAlignBytes, kRows>(p, first_row, head, pe_index<kThreads>(slice, slices, j)), head, multiplier);
  }
}

}  // namespace mla_fp8::absorb_q
