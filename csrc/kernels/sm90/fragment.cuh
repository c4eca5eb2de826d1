// Rows in registers: a 64-row tile as wgmma's A fragment, for KLoop.
//
// Lane 4 g + t of warp w has rows 16 w + g and 16 w + g + 8: a quad of lanes holds a whole row.
//   A, 32 columns   words {row, row + 8} x {columns 4 t.., columns 16 + 4 t..} in the order (0,0)
//                   (1,0) (0,1) (1,1), four e4m3 each
//   16-bit rows     columns 4 t.. and 16 + 4 t.. of every 32, in 8-byte accesses: what the lane's A
//                   words are made of
// So on the way from 16-bit rows to the fragment, lanes exchange nothing but a row's amax.
#pragma once

#include "kernels/numbers.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/memory.cuh"
#include "kernels/sm90/lanes.cuh"
#include "kernels/sm90/weights.cuh"

namespace mla_fp8::sm90 {

// The A fragments of a 64x128 tile, of each term, and the scales of the lane's two rows.
template <int kMostTerms>
struct Fragment {
  u32 a[kMostTerms][kSteps][4];
  float scale[kLaneRows];
};

// product [64,128] = the fragment times the weight tile's transpose, the least term first; complete
// on return.
template <int kTerms, int kMostTerms>
MLA_FP8_DEVICE void multiply_fragment(float (&product)[64], Fragment<kMostTerms>& fragment, const u8* tile) {
  const u64 descriptor = descriptor_of(tile);
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
#pragma unroll
    for (auto& step : fragment.a[term]) {
#pragma unroll
      for (u32& word : step) ptx::settle(word);
    }
  }
  ptx::wgmma_fence_sync_aligned();
#pragma unroll
  for (int i = 0; i < kTerms * kSteps; ++i)
    ptx::wgmma_m64n128k32_f32_e4m3_e4m3(product, fragment.a[kTerms - 1 - i / kSteps][i % kSteps],
                                        descriptor + i % kSteps * kStepDescriptor, i != 0);
  ptx::wgmma_commit_group_sync_aligned();
  ptx::wgmma_wait_group_sync_aligned<0>();
}

// How a block of the lane's two rows comes to registers: through a stage of shared memory, or
// straight.
template <class C, class Rows>
struct FragmentSource;

// 16-bit rows. In a stage, a warp has its 16 rows. Pairs of vectors are swizzled by row, so that
// the 8 bytes of 16 lanes lie in 32 different banks.
template <class C, int kMostTerms>
struct FragmentSource<C, Terms<kMostTerms>> {
  const Product& p;
  const u16* from;  // the head's
  int quad;

  using RawRow = u32[4 * kSteps];  // of 32 columns the words of 4 t.., then those of 16 + 4 t..

  MLA_FP8_DEVICE FragmentSource(const Product& product, i32 head, int lane_quad)
      : p(product), from(static_cast<const u16*>(product.x) + head * product.x_stride[1]), quad(lane_quad) {}

  static constexpr int kRows = kWgmmaM / kWarpgroupWarps;
  static constexpr int kRowVectors = 2 * kGroup / kVectorBytes;

  static MLA_FP8_DEVICE u8* place(typename C::Stage& stage, int warp_row, int vector) {
    u8* rows = stage.vector[0][0] + threadIdx.x % kWarpgroup / kWarp * (kRows * 2 * kGroup);
    return rows + warp_row * (2 * kGroup) + (vector ^ warp_row % kQuad * 2) * kVectorBytes;
  }

  MLA_FP8_DEVICE void fetch(typename C::Stage& stage, i64 row, i32 block) const {
    const int lane = threadIdx.x % kWarp;
    const i64 first_row = row - lane / kQuad;  // of the warp's
#pragma unroll
    for (int i = 0; i < kRows; i += kWarp / kRowVectors) {
      const int warp_row = i + lane / kRowVectors;
      const bool exists = first_row + warp_row < p.s;
      ptx::cp_async_cg_16(
          place(stage, warp_row, lane % kRowVectors),
          from + (exists ? first_row + warp_row : 0) * p.x_stride[0] + block * kGroup + lane % kRowVectors * 8,
          exists ? kVectorBytes : 0);
    }
  }

  MLA_FP8_DEVICE void consume(typename C::Stage& stage, Fragment<kMostTerms>& fragment) const {
    const int lane = threadIdx.x % kWarp;
    RawRow raw[kLaneRows];
    __syncwarp();  // every lane has waited for its copies
#pragma unroll
    for (int i = 0; i < 2 * kLaneRows * kSteps; ++i) {
      const int row = i / (2 * kSteps), half = i % (2 * kSteps);  // halves of 32 columns
      const uint2 words = *reinterpret_cast<const uint2*>(
          place(stage, lane / kQuad + row * kLaneRowStep, 2 * half + quad / 2) + quad % 2 * 8);
      raw[row][2 * half] = words.x, raw[row][2 * half + 1] = words.y;
    }
    __syncwarp();  // the next rows may come
    split_rows(raw, fragment);
  }

  MLA_FP8_DEVICE void load(i64 row, i32 block, Fragment<kMostTerms>& fragment) const {
    RawRow raw[kLaneRows];
#pragma unroll
    for (int i = 0; i < 2 * kLaneRows * kSteps; ++i) {
      const int half = i % (2 * kSteps);
      const i64 at = row + i / (2 * kSteps) * kLaneRowStep;
      const u16* words = from + at * p.x_stride[0] + block * kGroup + half * (kWgmmaK / 2) + quad * 4;
      u32* to = raw[i / (2 * kSteps)] + 2 * half;
      if (at >= p.s) {
        to[0] = to[1] = 0;
      } else if constexpr (C::kAligned) {
        ptx::ld_global_no_allocate_v2(to, words);
      } else {
        to[0] = words[0] | static_cast<u32>(words[1]) << 16, to[1] = words[2] | static_cast<u32>(words[3]) << 16;
      }
    }
    split_rows(raw, fragment);
  }

  MLA_FP8_DEVICE void split_rows(const RawRow (&raw)[kLaneRows], Fragment<kMostTerms>& fragment) const {
    const u32 amax[kLaneRows] = {amax_bits<kQuad>(raw[0]), amax_bits<kQuad>(raw[1])};
    with_split<kMostTerms>(p.terms, p.x_dtype == Dtype::kFp16, [&](auto how) {
      using S = decltype(how);
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
        u32 packed[S::kTerms][2 * kSteps];
        fragment.scale[i] = split<S>(raw[i], amax[i], packed);
#pragma unroll
        for (int term = 0; term < S::kTerms; ++term) {
#pragma unroll
          for (int half = 0; half < 2 * kSteps; ++half)
            fragment.a[term][half / 2][half % 2 * 2 + i] = packed[term][half];
        }
      }
    });
  }
};

// Rows that are e4m3 already: a lane brings columns 16 t.. of each 64, and the quad transposes.
template <class C>
struct FragmentSource<C, Taken> {
  const Product& p;
  const u8* from;  // the head's
  const float* scale;  // likewise
  int quad;

  MLA_FP8_DEVICE FragmentSource(const Product& product, i32 head, int lane_quad)
      : p(product),
        from(static_cast<const u8*>(product.x) + head * product.x_stride[1]),
        scale(product.x_scale + head * product.x_scale_stride[1]),
        quad(lane_quad) {}

  static constexpr int kVectors = kGroup / (kQuad * kVectorBytes);  // of a lane, in a row's group
  using Vectors = u32[kLaneRows * kVectors][4];

  MLA_FP8_DEVICE const u8* vector_at(i64 row, i32 block, int i) const {
    return from + row * p.x_stride[0] + block * kGroup + (i % kVectors * kQuad + quad) * kVectorBytes;
  }
  MLA_FP8_DEVICE const float* scale_at(i64 row, i32 block) const {
    return scale + row * p.x_scale_stride[0] + block * p.x_scale_stride[2];
  }

  MLA_FP8_DEVICE void fetch(typename C::Stage& stage, i64 row, i32 block) const {
    const int thread = threadIdx.x % kWarpgroup;
#pragma unroll
    for (int i = 0; i < kLaneRows * kVectors; ++i) {
      const i64 at = row + i / kVectors * kLaneRowStep;
      const bool exists = at < p.s;
      if (i % kVectors == 0)
        ptx::cp_async_ca_4(&stage.scale[i / kVectors][thread], scale_at(exists ? at : 0, block), exists ? 4 : 0);
      ptx::cp_async_cg_16(stage.vector[i][thread], vector_at(exists ? at : 0, block, i), exists ? kVectorBytes : 0);
    }
  }

  MLA_FP8_DEVICE void consume(const typename C::Stage& stage, Fragment<1>& fragment) const {
    const int thread = threadIdx.x % kWarpgroup;
    Vectors vectors;
#pragma unroll
    for (int i = 0; i < kLaneRows * kVectors; ++i) load_words(vectors[i], stage.vector[i][thread]);
    arrange(vectors, fragment);
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) fragment.scale[i] = stage.scale[i][thread];
  }

  MLA_FP8_DEVICE void load(i64 row, i32 block, Fragment<1>& fragment) const {
    Vectors vectors;
#pragma unroll
    for (int i = 0; i < kLaneRows * kVectors; ++i) {
      const i64 at = row + i / kVectors * kLaneRowStep;
      const bool exists = at < p.s;
      if (i % kVectors == 0) fragment.scale[i / kVectors] = exists ? *scale_at(at, block) : 0;
      const u8* bytes = vector_at(at, block, i);
      u32(&word)[4] = vectors[i];
      if (!exists) {
        word[0] = word[1] = word[2] = word[3] = 0;
      } else if constexpr (C::kAligned) {
        ptx::ld_global_no_allocate_v4(word, bytes);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          word[j] =
              bytes[4 * j] | bytes[4 * j + 1] << 8 | bytes[4 * j + 2] << 16 | static_cast<u32>(bytes[4 * j + 3]) << 24;
        }
      }
    }
    arrange(vectors, fragment);
  }

  // Lane t has columns 16 t.. of each 64, and gets 4 t.., 16 + 4 t.., 32 + 4 t.., 48 + 4 t...
  MLA_FP8_DEVICE void arrange(Vectors& vectors, Fragment<1>& fragment) const {
#pragma unroll
    for (int i = 0; i < kLaneRows * kVectors; ++i) {
      transpose(vectors[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) fragment.a[0][i % kVectors * 2 + j / 2][j % 2 * 2 + i / kVectors] = vectors[i][j];
    }
  }

  // word[i] of lane t becomes word[t] of lane i.
  MLA_FP8_DEVICE void transpose(u32 (&word)[4]) const {
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
};

}  // namespace mla_fp8::sm90
