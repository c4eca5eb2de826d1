// OwnRows: many rows a head, each warpgroup with rows of its own. All of k's weights stay.
//
// 1. Formula   that of few.cuh
//
// 2. Tensors   as in product.h; x, q_pe and out aligned to 16 bytes.
//
// 3. Grid      A CTA holds kTileN columns of one head's weights and takes row tiles of 64 rows a
//              warpgroup (grid.cuh).
//
// 4. Warps     kWarpgroups warpgroups, 64 rows each, which share nothing but the weights. Each warp
//              brings its own 16 rows to shared memory as they are, and splits them on the way to
//              registers, where they are wgmma's A. kStages warps start the copy of one weight tile
//              each. Registers: kBlocks = 1: 16 a term of the fragment and two products of 64, one of
//              which is scaled and stored while the other is made; else 64 sums, a product of 64 and
//              two fragments, one of which is split while the other is multiplied.
//
// 5. Pipeline  barrier         producer -> consumer              arrivals     bytes
//              full[tile]      copy engine -> all                1            16384
//              cp.async batch  a warp -> itself                  32           128 a thread, 64 q_pe
//              phase           a burst stored -> the next read   all CTAs     -
//              Without phases a batch a stage is under way, and each stage is filled again as soon
//              as it has been read. With phases all stages are filled, then all are worked on.
//
// 6. Shared memory   w 16384 bytes a tile of 128 x 128; a stage 16384 bytes of rows and, where there
//              is q_pe, 8192 of it: as many stages as fit in kRowStages times 16384 a warpgroup.
//
// 7. Cost      Bytes: x and out once, weights once a CTA. Bound by memory.
//
// 8. Numerics  those of few.cuh, bit for bit.
#pragma once

#include "kernels/sm90/bursts.cuh"
#include "kernels/sm90/fragment.cuh"
#include "kernels/sm90/pe.cuh"
#include "kernels/sm90/sums.cuh"

namespace mla_fp8::sm90 {

// A warpgroup's rows on their way: items of 64 rows and one block of k, in the order of their use.
template <class C>
struct OwnStages {
  using PeOf = Pe<kWgmmaM, kWarpgroup, true, C::kOutBytes>;
  const RawRows& source;
  const PeOf& pe;
  u8* bytes;  // the warpgroup's
  bool has_pe;
  int lane_row;

  MLA_FP8_DEVICE int count() const { return has_pe ? C::kStagesWithPe : C::kRowStages; }
  MLA_FP8_DEVICE u8* rows(int stage) const {
    return bytes + stage * (has_pe ? C::kRowsBytes + C::kPeBytes : C::kRowsBytes);
  }
  MLA_FP8_DEVICE u8* pe_slot(int stage, int i) const {
    return rows(stage) + C::kRowsBytes + (i * kWarpgroup + threadIdx.x % kWarpgroup) * kVectorBytes;
  }

  MLA_FP8_DEVICE void fetch(int stage, u32 first_row, i32 block) const {
    source.copy(rows(stage), first_row + lane_row, block);
    if constexpr (C::Store::kPe) {
      if (!has_pe) return;
#pragma unroll
      for (int i = 0; i < C::kPeSlots; ++i) {
        const PeChunk chunk = pe.place(first_row, i);
        if (chunk.exists) ptx::cp_async_cg_16(pe_slot(stage, i), pe.source(chunk), kVectorBytes);
      }
    }
  }

  // Waits for the oldest batch that is not taken yet. Of k of several blocks the one before it has
  // been taken, and its stage is not filled again yet.
  MLA_FP8_DEVICE void wait_oldest() const {
    constexpr int kTaken = C::kBlocks == 1 ? 0 : 1;
    if (C::Store::kPe && has_pe) {
      ptx::cp_async_wait_group<C::kStagesWithPe - 1 - kTaken>();
    } else {
      ptx::cp_async_wait_group<C::kRowStages - 1 - kTaken>();
    }
  }

  MLA_FP8_DEVICE void store_pe(int stage, u32 first_row) const {
    if constexpr (C::Store::kPe) {
      if (!has_pe) return;
#pragma unroll
      for (int i = 0; i < C::kPeSlots; ++i) {
        PeChunk chunk = pe.place(first_row, i);
        load_words(chunk.word, pe_slot(stage, i));
        pe.store(chunk);
      }
      pe.copy_from(first_row, C::kPeSlots);
    }
  }
};

// What a warpgroup multiplies: 64 rows from first_row on, in stages from `stage` on.
template <class C, class S>
struct OwnTile {
  const Product& p;
  typename C::Shared& shared;
  const OwnStages<C>& stages;
  const Place& at;
  const float (&w_scale)[C::kStages];

  using Sums = float[64];

  template <class Value>
  MLA_FP8_DEVICE void store(u32 first_row, int chunk, const Value& sums) const {
    const i32 column = at.slice * C::kTileN + chunk * kChunkN;
    const i64 row = i64{first_row} + stages.lane_row;
    if (C::kOutBytes == 1 || (C::kOutBytes == 0 && p.out_dtype == Dtype::kE4m3)) {
      store_sums<C, kChunkN>(E4m3{}, p, at.head, column, row, p.s, sums, stages.pe.multiplier);
    } else if constexpr (C::kOutBytes != 1) {
      store_sums<C, kChunkN>(typename S::Element{}, p, at.head, column, row, p.s, sums, 1.0f);
    }
  }

  // One block of k and kChunks chunks of columns, of which one is multiplied while the one before is
  // stored. `take` gives the words of the rows.
  template <class Take, class Refill>
  MLA_FP8_DEVICE void chunks(u32 first_row, const Take& take, const Refill& refill) const {
    Fragment<S::kTerms> fragment;
    take(fragment);
    refill();
    constexpr bool kOverlap = C::kOverlap != 0;
    Sums product[kOverlap ? 2 : 1];
    multiply_fragment<S::kTerms>(product[0], fragment, shared.w[0]);
#pragma unroll
    for (int c = 0; c < C::kChunks; ++c) {
      if (!kOverlap) {
        if (c != 0) multiply_fragment<S::kTerms>(product[0], fragment, shared.w[c]);
        ptx::wgmma_wait_group_sync_aligned<0>();
      } else
      if (c + 1 < C::kChunks) {
        multiply_fragment<S::kTerms>(product[(c + 1) % 2], fragment, shared.w[c + 1]);
        ptx::wgmma_wait_group_sync_aligned<1>();
      } else {
        ptx::wgmma_wait_group_sync_aligned<0>();
      }
      const float scale[] = {__fmul_rn(fragment.scale[0], w_scale[c]), __fmul_rn(fragment.scale[1], w_scale[c])};
      // From +0, as a sum of blocks begins.
      store(first_row, c, [&](int i) { return __fmaf_rn(product[kOverlap ? c % 2 : 0][i], scale[i / 2 % 2], 0.0f); });
    }
  }

  // kBlocks blocks of k, of which one is multiplied while the next one's rows are split.
  template <class Take, class Refill>
  MLA_FP8_DEVICE void blocks(u32 first_row, const Take& take, const Refill& refill) const {
    Fragment<S::kTerms> fragment[2];
    Sums product, sums = {};
    take(fragment[0]);
    multiply_fragment<S::kTerms>(product, fragment[0], shared.w[0]);
#pragma unroll
    for (int k = 0; k < C::kBlocks; ++k) {
      if (k + 1 < C::kBlocks) {
        take(fragment[(k + 1) % 2]);
        settle(fragment[(k + 1) % 2]);  // before the wait, not after it
      }
      ptx::wgmma_wait_group_sync_aligned<0>();
      const float scale[] = {__fmul_rn(fragment[k % 2].scale[0], w_scale[k]),
                             __fmul_rn(fragment[k % 2].scale[1], w_scale[k])};
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[i] = __fmaf_rn(product[i], scale[i / 2 % 2], sums[i]);
#pragma unroll
      for (float& sum : sums) ptx::settle(sum);
      refill();
      if (k + 1 < C::kBlocks) multiply_fragment<S::kTerms>(product, fragment[(k + 1) % 2], shared.w[k + 1]);
    }
    store(first_row, 0, [&](int i) { return sums[i]; });
  }

  template <class Take, class Refill>
  MLA_FP8_DEVICE void run(u32 first_row, const Take& take, const Refill& refill) const {
    if constexpr (C::kBlocks == 1) {
      chunks(first_row, take, refill);
    } else {
      blocks(first_row, take, refill);
    }
  }
};

// All row tiles, all reading and all writing in turn.
template <class C, class S>
MLA_FP8_DEVICE void run_phased(const Params& params, const OwnTile<C, S>& tile, u32 first_row, u32 step) {
  const OwnStages<C>& stages = tile.stages;
  const u32 s = static_cast<u32>(params.product.s);
  const Bursts bursts = bursts_of<C>(s, tile.at, stages.count());
  phases::Barrier phase{params.phase_slot};
  for (u32 done = 0; done < bursts.count; ++done) {
    const u32 left = first_row < s ? (s - first_row + step - 1) / step : 0;
    const int tiles = static_cast<int>(min(left, bursts.tiles));
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) stages.fetch(i, first_row + i * step, 0);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    if (done == 0) {
      for (u64& full : tile.shared.full) wait(&full, 0);
    }
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      stages.store_pe(i, first_row + i * step);
      tile.run(first_row + i * step, [&](auto& fragment) {
        split_rows<S>(fragment, [&](auto& words, int row) { stages.source.take(words, stages.rows(i), row); });
      }, [] {});
    }
    first_row += bursts.tiles * step;
    if (done + 1 < bursts.count) phase.wait_for_all();
  }
}

// All row tiles; the next rows come while one is worked on.
template <class C, class S>
MLA_FP8_DEVICE void run_streamed(const Params& params, const OwnTile<C, S>& tile, u32 first_row, u32 step) {
  const OwnStages<C>& stages = tile.stages;
  const u32 s = static_cast<u32>(params.product.s);
  u64 next_row = first_row;
  i32 next_block = 0;
  const auto fetch = [&](int stage) {
    if (next_row < s) {
      stages.fetch(stage, static_cast<u32>(next_row), next_block);
      if (++next_block == C::kBlocks) next_block = 0, next_row += step;
    }
    ptx::cp_async_commit_group();
  };
  for (int stage = 0; stage < stages.count(); ++stage) fetch(stage);
  for (u64& full : tile.shared.full) wait(&full, 0);
  int taken = 0, free = 0;
  const auto after = [&](int stage) { return stage + 1 == stages.count() ? 0 : stage + 1; };
#pragma unroll 1
  for (u64 row = first_row; row < s; row += step) {
    const auto take = [&](auto& fragment) {
      stages.wait_oldest();
      __syncwarp();
      split_rows<S>(fragment, [&](auto& words, int i) { stages.source.take(words, stages.rows(taken), i); });
      stages.store_pe(taken, static_cast<u32>(row));
      __syncwarp();
      taken = after(taken);
    };
    tile.run(static_cast<u32>(row), take, [&] { fetch(free), free = after(free); });
  }
}

template <class C>
MLA_FP8_DEVICE void run_own(const Params& params, typename C::Shared& shared) {
  const Product& p = params.product;
  const i32 slices = static_cast<i32>(p.n) / C::kTileN;
  const Place at = place_of(p.heads, slices);
  const u32 s = static_cast<u32>(p.s);  // below 2^31
  const u32 first_row = static_cast<u32>(at.row_tile) * C::kTileM, step = static_cast<u32>(at.row_step) * C::kTileM;
  begin_with_weights<C>(params, shared, at, C::kPhased || first_row < s);
  if (!C::kPhased && first_row >= s) return;

  float w_scale[C::kStages];
#pragma unroll
  for (int i = 0; i < C::kStages; ++i) {
    const i64 row = (at.slice * C::kTileN + i / C::kBlocks * kChunkN) / kChunkN;
    w_scale[i] =
        p.w_scale[at.head * p.w_scale_stride[0] + row * p.w_scale_stride[1] + i % C::kBlocks * p.w_scale_stride[2]];
  }
  const LanePlace lane = lane_place();
  const RawRows source(p, at.head, lane.quad);
  const typename OwnStages<C>::PeOf pe{p, at.head, at.slice, slices, read_multiplier<typename C::Store>(p)};
  const int warpgroup = threadIdx.x / kWarpgroup;
  const OwnStages<C> stages{source, pe, shared.rows[warpgroup], C::Store::kPe && p.pe != 0, lane.row};
  const u32 own_row = first_row + warpgroup * kWgmmaM;
  with_split<C::kMostTerms>(p.terms, p.x_dtype == Dtype::kFp16, [&](auto split) {
    const OwnTile<C, decltype(split)> tile{p, shared, stages, at, w_scale};
    if constexpr (C::kPhased) {
      run_phased(params, tile, own_row, step);
    } else {
      run_streamed(params, tile, own_row, step);
    }
  });
  for (u64& full : shared.full) wait(&full, 0);  // every copy has landed before the CTA ends
}

}  // namespace mla_fp8::sm90
