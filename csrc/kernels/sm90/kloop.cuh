// KLoop: any k and any alignment.
//
// 1. Formula   that of few.cuh, with x_val and x_scale given for bmm
//
// 2. Tensors   as in product.h; x, q_pe and out aligned to 16 bytes, or to an element.
//
// 3. Grid      A CTA takes tiles of 64 rows a warpgroup and 128 columns of one head (grid.cuh).
//
// 4. Warps     kWarpgroups warpgroups, 64 rows each. The last warp's first lane also starts the
//              copies of weights. Registers: 64 sums, 64 of a block's product, 16 of the A
//              fragment, 32 of raw 16-bit rows.
//
// 5. Pipeline  barrier         producer -> consumer                arrivals  bytes
//              full[stage]     copy engine -> all                  1         16384
//              empty[stage]    all -> the producer                 1 a warp  -
//              cp.async batch  a warp -> itself (16-bit rows)      32        128 a thread
//              cp.async batch  a thread -> itself (e4m3 rows)      -         72 a thread
//              kStages batches are under way. Where k <= 128 kStages, every weight tile is loaded
//              once and stays for all row tiles, and empty is not used.
//
// 6. Shared memory   w 16384 bytes a stage, 128-byte swizzle; rows 16384 (16-bit) or 9216 (e4m3) a
//              stage and warpgroup. With one stage, or with unaligned rows, there are no rows in
//              shared memory: they go to registers a block at a time.
//
// 7. Cost      Bytes: x and out once; weights once a CTA if they stay, else once a row tile, from
//              L2.
//
// 8. Numerics  those of few.cuh, bit for bit, whatever the grid and the number of stages.
#pragma once

#include "kernels/sm90/fragment.cuh"
#include "kernels/sm90/pe.cuh"
#include "kernels/sm90/sums.cuh"

namespace mla_fp8::sm90 {

template <class C>
struct Ring {
  static constexpr int kStages = C::kStages;
  const Params& params;
  typename C::Shared& shared;
  i32 head, first_column, blocks;
  i64 total;  // tiles to load in all
  i64 used = 0;  // tiles multiplied so far
  i32 next_block = 0;  // of the next tile to load

  MLA_FP8_DEVICE bool stays() const { return C::kBlocks != 0 || blocks <= kStages; }

  // The thread that starts copies: in the warp with the fewest rows.
  static MLA_FP8_DEVICE bool is_producer() { return threadIdx.x == C::kThreads - kWarp; }

  MLA_FP8_DEVICE WeightPlace place(i32 block) const { return {block * kGroup, first_column, head}; }

  // Producer: the next tile into a stage, which is free. It counts blocks, as a division of 64-bit
  // numbers would take longer than a multiplication of tiles.
  MLA_FP8_DEVICE void fill(int stage) {
    load_weights<C, kChunkN>(params, place(next_block), shared.w[stage], &shared.full[stage]);
    next_block = next_block + 1 == blocks ? 0 : next_block + 1;
  }

  MLA_FP8_DEVICE void prepare() {
    ptx::prefetch_tensormap(&params.w);
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      if (stage < blocks) prefetch_weights<C, kChunkN>(params, place(stage), &shared.full[stage]);
      ptx::mbarrier_init(&shared.empty[stage], C::kThreads / kWarp);
    }
  }

  MLA_FP8_DEVICE void start() {
    if (!is_producer()) return;
    for (int stage = 0; stage < kStages && stage < total; ++stage) fill(stage);
  }

  MLA_FP8_DEVICE const u8* acquire(int block) {
    const int stage = stays() ? block : static_cast<int>(used % kStages);
    wait(&shared.full[stage], stays() ? 0 : static_cast<u32>(used / kStages) & 1);
    return shared.w[stage];
  }

  MLA_FP8_DEVICE void release() {
    if (stays()) return;
    const int stage = static_cast<int>(used % kStages);
    if (threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
    if (is_producer() && used + kStages < total) {
      wait(&shared.empty[stage], static_cast<u32>(used / kStages) & 1);
      fill(stage);
    }
    __syncwarp();
    ++used;
  }
};

// Stores the warpgroup's 64 rows and 128 columns and its share of the rows' q_pe.
template <class C>
MLA_FP8_DEVICE void store_with_pe(const Product& p, const Place& at, i32 first_column, i64 row,
                                  const float (&sums)[64]) {
  const LanePlace lane = lane_place();
  const float out_multiplier = read_multiplier<typename C::Store>(p);
  if (C::Store::kPe && p.pe != 0) {
    const i32 slices = static_cast<i32>(p.n) / C::kTileN;
    const Pe<kWgmmaM, kWarpgroup, C::kAligned, C::kOutBytes> pe{p, at.head, at.slice, slices, out_multiplier};
    pe.copy_from(static_cast<u32>(row - lane.row), 0);
  }
  with_output<typename C::Store, true>(p, [&](auto element) {
    store_sums<C>(
        element, p, at.head, first_column, static_cast<u32>(row), static_cast<u32>(p.s), [&](int i) { return sums[i]; },
        out_multiplier);
  });
}

// The rows to come, a block at a time, through the stages of shared memory.
template <class C>
struct FragmentsAhead {
  const FragmentSource<C, typename C::Rows>& source;
  typename C::Shared& shared;
  i64 lane_row, row_tile, row_step, row_tiles;
  i32 blocks, block = 0;

  // The next block to `stage`, if there is one; a batch of copies in any case.
  MLA_FP8_DEVICE void fetch(int stage) {
    if constexpr (C::kStaged) {
      if (row_tile < row_tiles) {
        source.fetch(shared.stage[stage][threadIdx.x / kWarpgroup], row_tile * C::kTileM + lane_row, block);
        if (++block == blocks) {
          block = 0;
          row_tile += row_step;
        }
      }
      ptx::cp_async_commit_group();
    }
  }
};

template <class C>
MLA_FP8_DEVICE void run_kloop(const Params& params, typename C::Shared& shared) {
  constexpr int kStages = C::kStages;
  const Product& p = params.product;
  const Place at = place_of(p.heads, static_cast<i32>(p.n) / C::kTileN);
  const i32 first_column = at.slice * C::kTileN;
  const i32 all_blocks = static_cast<i32>(p.k) / kGroup;
  const i64 row_tiles = (p.s + C::kTileM - 1) / C::kTileM;
  const i64 own_row_tiles = (row_tiles - at.row_tile + at.row_step - 1) / at.row_step;
  Ring<C> ring{params, shared, at.head, first_column, all_blocks, 0};
  ring.total = own_row_tiles <= 0 ? 0 : ring.stays() ? all_blocks : own_row_tiles * all_blocks;
  begin(ring.is_producer(), [&] { ring.prepare(); });
  ring.start();
  __syncwarp();

  const int warpgroup = threadIdx.x / kWarpgroup;
  const LanePlace lane = lane_place();
  const i64 lane_row = warpgroup * kWgmmaM + lane.row;
  const FragmentSource<C, typename C::Rows> source(p, at.head, lane.quad);
  FragmentsAhead<C> ahead{source, shared, lane_row, at.row_tile, at.row_step, row_tiles, all_blocks};
  for (int stage = 0; stage < kStages; ++stage) ahead.fetch(stage);

  const float* w_scale_from = p.w_scale + at.head * p.w_scale_stride[0] + at.slice * p.w_scale_stride[1];
  int stage = 0;
  for (i64 row_tile = at.row_tile; row_tile < row_tiles; row_tile += at.row_step) {
    const i64 row = row_tile * C::kTileM + lane_row;
    float sums[64];
#pragma unroll
    for (float& sum : sums) sum = 0;
    const i32 blocks = C::kBlocks != 0 ? C::kBlocks : all_blocks;
#pragma unroll 1
    for (i32 block = 0; block < blocks; ++block) {
      const float w_scale = w_scale_from[block * p.w_scale_stride[2]];
      Fragment<C::kMostTerms> fragment;
      if constexpr (C::kStaged) {
        ptx::cp_async_wait_group<kStages - 1>();
        source.consume(shared.stage[stage][warpgroup], fragment);
        ahead.fetch(stage);
        stage = stage + 1 == kStages ? 0 : stage + 1;
      } else {
        source.load(row, block, fragment);
      }
      float product[64];
      const u8* tile = ring.acquire(block);
      with_terms<C::kMostTerms>(p.terms, [&](auto terms) {
        multiply_fragment<terms.kCount>(product, fragment, tile);
        ptx::wgmma_wait_group_sync_aligned<0>();
      });
      ring.release();
      float scale[kLaneRows];
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) scale[i] = __fmul_rn(fragment.scale[i], w_scale);
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[i] = __fmaf_rn(product[i], scale[i / 2 % 2], sums[i]);
    }
    store_with_pe<C>(p, at, first_column, row, sums);
  }
}

}  // namespace mla_fp8::sm90
