// Rows in registers: a 64-row tile as wgmma's A fragment.
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

// The fragment is made before this point.
template <int kMostTerms>
MLA_FP8_DEVICE void settle(Fragment<kMostTerms>& fragment) {
#pragma unroll
  for (auto& term : fragment.a) {
#pragma unroll
    for (auto& step : term) {
#pragma unroll
      for (u32& word : step) ptx::settle(word);
    }
  }
}

// product [64,128] = the fragment times the weight tile's transpose, the least term first. It is
// complete, and the fragment is free, after wgmma_wait_group.
template <int kTerms, int kMostTerms>
MLA_FP8_DEVICE void multiply_fragment(float (&product)[64], Fragment<kMostTerms>& fragment, const u8* tile) {
  const u64 descriptor = descriptor_of(tile);
  settle(fragment);
  ptx::wgmma_fence_sync_aligned();
#pragma unroll
  for (int i = 0; i < kTerms * kSteps; ++i)
    ptx::wgmma_m64n128k32_f32_e4m3_e4m3(product, fragment.a[kTerms - 1 - i / kSteps][i % kSteps],
                                        descriptor + i % kSteps * kStepDescriptor, i != 0);
  ptx::wgmma_commit_group_sync_aligned();
}

// The warp's 16 of 64 rows as fragments, from planes under the 128-byte swizzle, and their scales.
// From shared memory wgmma would take its A at half the speed.
template <int kTerms>
MLA_FP8_DEVICE void take_planes(Fragment<kTerms>& fragment, const u8* planes, const float* scale) {
  const int lane = threadIdx.x % kWarp;
  const int row = threadIdx.x % kWarpgroup / kWarp * 16 + lane % 16;
  const u8* from = planes + row * kGroup;
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      ptx::ldmatrix_sync_aligned_m8n8_x4_shared_b16(
          fragment.a[term][step], from + term * (kWgmmaM * kGroup) + ((step * 2 + lane / 16) ^ row % 8) * kVectorBytes);
  }
  const int lane_row = lane_place().row;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) fragment.scale[i] = scale[lane_row + i * kLaneRowStep];
}

// How a block of the lane's two rows comes to registers: through a stage of shared memory, or
// straight.
template <class C, class Rows>
struct FragmentSource;

// 16-bit rows. In a stage, a warp has its 16 rows of 128 columns. Pairs of vectors are swizzled by
// row, so that the 8 bytes of 16 lanes lie in 32 different banks.
struct RawRows {
  const Product& p;
  const u16* from;  // the head's
  int quad;

  static constexpr int kBytes = kWgmmaM * 2 * kGroup;  // of a warpgroup's stage
  static constexpr int kRows = kWgmmaM / kWarpgroupWarps;
  static constexpr int kRowVectors = 2 * kGroup / kVectorBytes;
  // A lane's row: of 32 columns the words of 4 t.., then those of 16 + 4 t..
  using Row = u32[4 * kSteps];

  MLA_FP8_DEVICE RawRows(const Product& product, i32 head, int lane_quad)
      : p(product), from(static_cast<const u16*>(product.x) + head * product.x_stride[1]), quad(lane_quad) {}

  // Of the warp in the stage.
  static MLA_FP8_DEVICE u8* place(u8* stage) {
    return stage + threadIdx.x % kWarpgroup / kWarp * (kRows * kRowVectors * kVectorBytes);
  }

  // A warp's copies of its rows, of which `row` is the lane's first. Of a row that does not exist
  // nothing is read.
  MLA_FP8_DEVICE void copy(u8* stage, i64 row, i32 block) const {
    constexpr int kRowsAtOnce = kWarp / kRowVectors;
    const int lane = threadIdx.x % kWarp, warp_row = lane / kRowVectors;
    const i64 first_row = row - lane / kQuad + warp_row;
    const i32 rows = static_cast<i32>(min(p.s - first_row, i64{kRows}));  // that exist
    const u16* vector = from + first_row * p.x_stride[0] + block * kGroup + lane % kRowVectors * 8;
    const i64 step = kRowsAtOnce * p.x_stride[0];
    u8* to = place(stage) + warp_row * (kRowVectors * kVectorBytes);
    const int column = lane % kRowVectors ^ warp_row * 2;
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce, vector += step)
      ptx::cp_async_cg_16(to + (i * kRowVectors + (column ^ i % kQuad * 2)) * kVectorBytes, vector,
                          i < rows ? kVectorBytes : 0);
  }

  // The lane's i-th row, once every lane of the warp has waited for its copies. The next rows may
  // come once every lane has taken both of its own.
  MLA_FP8_DEVICE void take(Row& words, u8* stage, int i) const {
    const int lane_row = threadIdx.x % kWarp / kQuad;
    const u8* from_row = place(stage) + (lane_row + i * kLaneRowStep) * (kRowVectors * kVectorBytes) + quad * 8;
#pragma unroll
    for (int half = 0; half < 2 * kSteps; ++half) {  // of 32 columns
      const int pair = half / kQuad * kQuad + (half % kQuad ^ lane_row % kQuad);  // of vectors
      const uint2 two = *reinterpret_cast<const uint2*>(from_row + pair * (2 * kVectorBytes));
      words[2 * half] = two.x, words[2 * half + 1] = two.y;
    }
  }

  // Straight from global memory.
  template <bool kAligned>
  MLA_FP8_DEVICE void load(Row& words, i64 row, i32 block) const {
#pragma unroll
    for (int half = 0; half < 2 * kSteps; ++half) {
      const u16* two = from + row * p.x_stride[0] + block * kGroup + half * (kWgmmaK / 2) + quad * 4;
      u32* to = words + 2 * half;
      if (row >= p.s) {
        to[0] = to[1] = 0;
      } else if constexpr (kAligned) {
        ptx::ld_global_no_allocate_v2(to, two);
      } else {
        to[0] = two[0] | static_cast<u32>(two[1]) << 16, to[1] = two[2] | static_cast<u32>(two[3]) << 16;
      }
    }
  }
};

// The rows' terms as fragments. get(words, i) gives the lane's i-th row.
template <class S, int kMostTerms, class Get>
MLA_FP8_DEVICE void split_rows(Fragment<kMostTerms>& fragment, const Get& get) {
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    RawRows::Row raw;
    get(raw, i);
    u32 packed[S::kTerms][2 * kSteps];
    fragment.scale[i] = split<S>(raw, amax_bits<kQuad>(raw), packed);
#pragma unroll
    for (int term = 0; term < S::kTerms; ++term) {
#pragma unroll
      for (int half = 0; half < 2 * kSteps; ++half) fragment.a[term][half / 2][half % 2 * 2 + i] = packed[term][half];
    }
  }
}

template <class C, int kMostTerms>
struct FragmentSource<C, Terms<kMostTerms>> : RawRows {
  using RawRows::RawRows;

  MLA_FP8_DEVICE void fetch(typename C::Stage& stage, i64 row, i32 block) const {
    copy(stage.vector[0][0], row, block);
  }
  MLA_FP8_DEVICE void consume(typename C::Stage& stage, Fragment<kMostTerms>& fragment) const {
    __syncwarp();
    split_all(fragment, [&](Row& words, int i) { take(words, stage.vector[0][0], i); });
    __syncwarp();
  }
  MLA_FP8_DEVICE void load(i64 row, i32 block, Fragment<kMostTerms>& fragment) const {
    split_all(fragment, [&](Row& words, int i) { RawRows::load<C::kAligned>(words, row + i * kLaneRowStep, block); });
  }
  template <class Get>
  MLA_FP8_DEVICE void split_all(Fragment<kMostTerms>& fragment, const Get& get) const {
    with_split<kMostTerms>(p.terms, p.x_dtype == Dtype::kFp16,
                           [&](auto split) { split_rows<decltype(split)>(fragment, get); });
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
