// absorb_q's last columns: q_pe copied, or quantized by the output's scale, beside the latent.
//
// A row tile's q_pe is cut into chunks of 8 columns. The column tiles of a head share them: slice i
// of n takes chunks kThreads (i + j n) + thread, j = 0, 1, ...
#pragma once

#include "kernels/sm90/store.cuh"

namespace mla_fp8::sm90 {

struct PeChunk {
  u32 word[4];
  u32 row;
  u32 column;
  bool exists;
};

// 8 activations from `from`.
template <bool kAligned>
MLA_FP8_DEVICE void load_vector(u32 (&to)[4], const u16* from) {
  if constexpr (kAligned) {
    ptx::ld_global_no_allocate_v4(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = from[2 * i] | static_cast<u32>(from[2 * i + 1]) << 16;
  }
}

// The q_pe of row tiles of kRows, which a CTA's or a warpgroup's kThreads threads copy. kOutBytes
// is as in a store: the bytes of an output element, or 0 where p.out_dtype says it at run time.
template <int kRows, int kThreads, bool kAligned, int kOutBytes>
struct Pe {
  const Product& p;
  i32 head, slice, slices;
  float multiplier = 1.0f;  // 1 / out_scale

  MLA_FP8_DEVICE bool is_e4m3() const { return kOutBytes == 0 ? p.out_dtype == Dtype::kE4m3 : kOutBytes == 1; }

  // A thread's j-th chunk of the row tile, without its words.
  MLA_FP8_DEVICE PeChunk place(u32 first_row, i32 j) const {
    constexpr u32 kUsualChunks = 64 / 8;
    const u32 index = (slice + j * slices) * kThreads + threadIdx.x % kThreads;
    const u32 chunks = static_cast<u32>(p.pe) / 8;
    const u32 row = chunks == kUsualChunks ? index / kUsualChunks : index / chunks;
    PeChunk chunk;
    chunk.row = first_row + row;
    chunk.column = (index - row * chunks) * 8;
    chunk.exists = row < kRows && chunk.row < static_cast<u32>(p.s);
    return chunk;
  }

  MLA_FP8_DEVICE const u16* source(const PeChunk& chunk) const {
    return static_cast<const u16*>(p.q_pe) + chunk.row * p.q_pe_stride[0] + head * p.q_pe_stride[1] + chunk.column;
  }

  MLA_FP8_DEVICE PeChunk load(u32 first_row, i32 j) const {
    PeChunk chunk = place(first_row, j);
    if (chunk.exists) load_vector<kAligned>(chunk.word, source(chunk));
    return chunk;
  }

  // As it will be stored: 8 bytes of e4m3, or the 16 that came.
  MLA_FP8_DEVICE void encode(u32 (&word)[4]) const {
    if (!is_e4m3()) return;
    if (p.x_dtype == Dtype::kFp16) {
      word[0] = e4m3x4_scaled<Fp16>(word[0], word[1], multiplier);
      word[1] = e4m3x4_scaled<Fp16>(word[2], word[3], multiplier);
    } else {
      word[0] = e4m3x4_scaled<Bf16>(word[0], word[1], multiplier);
      word[1] = e4m3x4_scaled<Bf16>(word[2], word[3], multiplier);
    }
  }

  MLA_FP8_DEVICE void store_encoded(const PeChunk& chunk) const {
    if (!chunk.exists) return;
    const i64 element = chunk.row * p.out_stride[0] + head * p.out_stride[1] + p.n + chunk.column;
    if (is_e4m3()) {
      store_words<8, kAligned, 1>(static_cast<u8*>(p.out) + element, chunk.word);
    } else {
      store_words<16, kAligned, 2>(static_cast<u8*>(p.out) + 2 * element, chunk.word);
    }
  }
  MLA_FP8_DEVICE void store(PeChunk chunk) const {
    encode(chunk.word);
    store_encoded(chunk);
  }

  // From the j-th chunk on: those that were not loaded ahead.
  MLA_FP8_DEVICE void copy_from(u32 first_row, i32 j) const {
    for (; (slice + j * slices) * kThreads < kRows * static_cast<i32>(p.pe / 8); ++j) store(load(first_row, j));
  }
};

}  // namespace mla_fp8::sm90
