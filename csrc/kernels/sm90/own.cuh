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
//              each. Registers: 16 a term of the fragment, a product of 64.
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

  MLA_FP8_DEVICE void fetch(int stage, u32 first_row) const {
    source.copy(rows(stage), first_row + lane_row, 0);
    if constexpr (C::Store::kPe) {
      if (!has_pe) return;
#pragma unroll
      for (int i = 0; i < C::kPeSlots; ++i) {
        const PeChunk chunk = pe.place(first_row, i);
        if (chunk.exists) ptx::cp_async_cg_16(pe_slot(stage, i), pe.source(chunk), kVectorBytes);
      }
    }
  }

  // Waits for the oldest of as many batches as there are stages.
  MLA_FP8_DEVICE void wait_oldest() const {
    if (C::Store::kPe && has_pe) {
      ptx::cp_async_wait_group<C::kStagesWithPe - 1>();
    } else {
      ptx::cp_async_wait_group<C::kRowStages - 1>();
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

// What a warpgroup multiplies, a row tile of 64 rows at a time.
template <class C>
struct OwnTile {
  const Product& p;
  typename C::Shared& shared;
  const OwnStages<C>& stages;
  const Place& at;
  const float (&w_scale)[C::kChunks];

  MLA_FP8_DEVICE void take(Fragment<C::kMostTerms>& fragment, int stage) const {
    __syncwarp();
    with_split<C::kMostTerms>(p.terms, p.x_dtype == Dtype::kFp16, [&](auto split) {
      split_rows<decltype(split)>(fragment,
                                  [&](auto& words, int i) { stages.source.take(words, stages.rows(stage), i); });
    });
  }

  MLA_FP8_DEVICE void multiply_and_store(Fragment<C::kMostTerms>& fragment, u32 first_row) const {
    const u32 row = first_row + stages.lane_row;
#pragma unroll
    for (int c = 0; c < C::kChunks; ++c) {
      float product[64];
      with_terms<C::kMostTerms>(p.terms, [&](auto terms) {
        multiply_fragment<terms.kCount>(product, fragment, shared.w[c]);
        ptx::wgmma_wait_group_sync_aligned<0>();
      });
      const float scale[] = {__fmul_rn(fragment.scale[0], w_scale[c]), __fmul_rn(fragment.scale[1], w_scale[c])};
      // From +0, as a sum of blocks begins.
      const auto value_of = [&](int i) { return __fmaf_rn(product[i], scale[i / 2 % 2], 0.0f); };
      with_output<typename C::Store, /*kOneFormat=*/false>(p, [&](auto element) {
        store_sums<C>(element, p, at.head, at.slice * C::kTileN + c * kChunkN, row, static_cast<u32>(p.s), value_of,
                      stages.pe.multiplier);
      });
    }
  }
};

// All row tiles, all reading and all writing in turn.
template <class C>
MLA_FP8_DEVICE void run_phased(const Params& params, const OwnTile<C>& tile, u32 first_row, u32 step) {
  const OwnStages<C>& stages = tile.stages;
  const u32 s = static_cast<u32>(params.product.s);
  const Bursts bursts = bursts_of<C>(s, tile.at, stages.count());
  phases::Barrier phase{params.phase_slot};
  for (u32 done = 0; done < bursts.count; ++done) {
    const u32 left = first_row < s ? (s - first_row + step - 1) / step : 0;
    const int tiles = static_cast<int>(min(left, bursts.tiles));
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) stages.fetch(i, first_row + i * step);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    if (done == 0) {
      for (u64& full : tile.shared.full) wait(&full, 0);
    }
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      stages.store_pe(i, first_row + i * step);
      Fragment<C::kMostTerms> fragment;
      tile.take(fragment, i);
      tile.multiply_and_store(fragment, first_row + i * step);
    }
    first_row += bursts.tiles * step;
    if (done + 1 < bursts.count) phase.wait_for_all();
  }
}

// All row tiles; the next rows come while one is worked on.
template <class C>
MLA_FP8_DEVICE void run_streamed(const Params& params, const OwnTile<C>& tile, u32 first_row, u32 step) {
  const OwnStages<C>& stages = tile.stages;
  const u32 s = static_cast<u32>(params.product.s);
  u64 next_row = first_row;
  const auto fetch = [&](int stage) {
    if (next_row < s) stages.fetch(stage, static_cast<u32>(next_row));
    next_row += step;
    ptx::cp_async_commit_group();
  };
  for (int stage = 0; stage < stages.count(); ++stage) fetch(stage);
  for (u64& full : tile.shared.full) wait(&full, 0);
  int stage = 0;
#pragma unroll 1
  for (u64 row = first_row; row < s; row += step) {
    stages.wait_oldest();
    Fragment<C::kMostTerms> fragment;
    tile.take(fragment, stage);
    stages.store_pe(stage, static_cast<u32>(row));
    __syncwarp();
    fetch(stage);
    stage = stage + 1 == stages.count() ? 0 : stage + 1;
    tile.multiply_and_store(fragment, static_cast<u32>(row));
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

  float w_scale[C::kChunks];
  read_weight_scales<C>(w_scale, p, at);
  const LanePlace lane = lane_place();
  const RawRows source(p, at.head, lane.quad);
  const typename OwnStages<C>::PeOf pe{p, at.head, at.slice, slices, read_multiplier<typename C::Store>(p)};
  const int warpgroup = threadIdx.x / kWarpgroup;
  const OwnStages<C> stages{source, pe, shared.rows[warpgroup], C::Store::kPe && p.pe != 0, lane.row};
  const u32 own_row = first_row + warpgroup * kWgmmaM;
  const OwnTile<C> tile{p, shared, stages, at, w_scale};
  if constexpr (C::kPhased) {
    run_phased(params, tile, own_row, step);
  } else {
    run_streamed(params, tile, own_row, step);
  }
  for (u64& full : shared.full) wait(&full, 0);  // every copy has landed before the CTA ends
}

}  // namespace mla_fp8::sm90
