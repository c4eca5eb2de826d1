// Pipelined: many rows a head where k is few blocks. Rows are brought, split and multiplied at the
// same time.
//
// 1. Formula   that of few.cuh
//
// 2. Tensors   as in product.h; x and out aligned to 16 bytes.
//
// 3. Grid      A CTA holds 128 columns of one head's weights and takes row tiles of 64 rows
//              (grid.cuh).
//
// 4. Warps     kSplitters threads bring the rows and split them, 8 a row and block; each thread
//              brings what it splits. The last warpgroup multiplies, scales and stores, with the
//              rows as wgmma's A in registers; its warps each start the copy of one weight tile.
//              Registers: 64 sums, a product of 64, 16 a term of the fragment.
//
// 5. Pipeline  barrier         producer -> consumer              arrivals     bytes
//              full[block]     copy engine -> the multiplier     1            16384
//              ready, stage    splitters -> the multiplier       all threads  -
//              taken, stage    the multiplier -> splitters       all threads  -
//              cp.async batch  a splitter -> itself              -            64 a thread
//              An item is 64 rows and one block of k. kRowStages items are under way; a stage is
//              filled again as soon as it has been read. Ready and taken are numbered barriers of
//              the CTA, on which the giving side only arrives.
//
// 6. Shared memory   w 16384 bytes a block; a stage of planes 8192 a term and 256 of scales; a stage
//              of rows 16384; barriers.
//
// 7. Cost      Bytes: x and out once, weights once a CTA. Bound by memory.
//
// 8. Numerics  those of few.cuh, bit for bit.
#pragma once

#include "kernels/ptx/barrier.cuh"
#include "kernels/ptx/setmaxnreg.cuh"
#include "kernels/sm90/fragment.cuh"
#include "kernels/sm90/rows.cuh"
#include "kernels/sm90/sums.cuh"

namespace mla_fp8::sm90 {

template <int kStages>
MLA_FP8_DEVICE int after(int stage) {
  return stage + 1 == kStages ? 0 : stage + 1;
}

// The stages of planes in turn, as both sides see them. All but the first round of them wait until
// the stage has been taken, so that all but the last round tell.
template <class C>
struct PlaneStages {
  u32 left;  // items, this one included
  int stage = 0;
  bool again = false;  // the stage was used before

  MLA_FP8_DEVICE int ready() const { return 1 + stage; }
  MLA_FP8_DEVICE int taken() const { return 1 + C::kPlaneStages + stage; }

  MLA_FP8_DEVICE void wait_until_taken() const {
    if (again) ptx::barrier_sync_aligned(taken(), C::kThreads);
  }
  MLA_FP8_DEVICE void tell_ready() const { ptx::barrier_arrive_aligned(ready(), C::kThreads); }
  MLA_FP8_DEVICE void wait_until_ready() const { ptx::barrier_sync_aligned(ready(), C::kThreads); }
  MLA_FP8_DEVICE void tell_taken() const {
    if (left > C::kPlaneStages) ptx::barrier_arrive_aligned(taken(), C::kThreads);
  }
  MLA_FP8_DEVICE void advance() {
    --left;
    stage = after<C::kPlaneStages>(stage);
    again = again || stage == 0;
  }
};

// The items of a CTA in order: row tiles first_row, first_row + step, ... and in each the blocks.
template <class C>
struct Items {
  u32 row, step, end;  // end and step are below 2^31
  i32 block = 0;
  MLA_FP8_DEVICE bool has_more() const { return row < end; }
  MLA_FP8_DEVICE u32 count() const { return (end - row + step - 1) / step * C::kBlocks; }
  MLA_FP8_DEVICE void advance() {
    if (++block == C::kBlocks) block = 0, row += step;
  }
};

template <class C, class S>
MLA_FP8_DEVICE void split_items(const Product& p, typename C::Shared& shared, i32 head, const Items<C>& items) {
  const u16* from = static_cast<const u16*>(p.x) + head * p.x_stride[1];
  const int lane = threadIdx.x % kParts, row = threadIdx.x / kParts;
  Items<C> next = items;
  const auto fetch = [&](int stage) {
    if (next.has_more()) {
#pragma unroll
      for (int i = 0; i < C::kSlots; ++i) {
        const u32 at = next.row + row + i * C::kSlotRows;
        const bool exists = at < next.end;
        copy_part(shared.rows[stage][i], from + (exists ? at : 0) * p.x_stride[0] + next.block * kGroup, lane, exists);
      }
      next.advance();
    }
    ptx::cp_async_commit_group();
  };
  for (int stage = 0; stage < C::kRowStages; ++stage) fetch(stage);
  PlaneStages<C> planes{items.count()};
  int stage = 0;
#pragma unroll 1
  for (; planes.left != 0; planes.advance(), stage = after<C::kRowStages>(stage)) {
    ptx::cp_async_wait_group<C::kRowStages - 1>();
    RowPart part[C::kSlots];
#pragma unroll
    for (int i = 0; i < C::kSlots; ++i) take_part(part[i], shared.rows[stage][i]);
    fetch(stage);
    planes.wait_until_taken();
#pragma unroll
    for (int i = 0; i < C::kSlots; ++i) {
      const int at = row + i * C::kSlotRows;
      split_part<S, C::kPlaneBytes>(shared.planes[planes.stage][0], &shared.scale[planes.stage][at], part[i], at, lane);
    }
    planes.tell_ready();
  }
}

// The products of the items, scaled and added, and of each row tile stored.
template <class C, class S>
MLA_FP8_DEVICE void multiply_items(const Product& p, typename C::Shared& shared, const Place& at,
                                   const Items<C>& items) {
  float w_scale[C::kBlocks];
  read_weight_scales<C>(w_scale, p, at);
  const float out_multiplier = read_multiplier<typename C::Store>(p);
  PlaneStages<C> planes{items.count()};
#pragma unroll 1
  for (u32 row = items.row; row < items.end; row += items.step) {
    float sums[64] = {};
#pragma unroll
    for (int k = 0; k < C::kBlocks; ++k) {
      wait(&shared.full[k], 0);
      planes.wait_until_ready();
      Fragment<S::kTerms> fragment;
      take_planes<S::kTerms>(fragment, shared.planes[planes.stage][0], shared.scale[planes.stage]);
      planes.tell_taken();
      planes.advance();
      float product[64];
      multiply_fragment<S::kTerms>(product, fragment, shared.w[k]);
      ptx::wgmma_wait_group_sync_aligned<0>();
      const float scale[] = {__fmul_rn(fragment.scale[0], w_scale[k]), __fmul_rn(fragment.scale[1], w_scale[k])};
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[i] = __fmaf_rn(product[i], scale[i / 2 % 2], sums[i]);
    }
    const auto value_of = [&](int i) { return sums[i]; };
    const i32 column = at.slice * C::kTileN;
    const u32 lane_row = row + lane_place().row, end = min(row + C::kTileM, items.end);
    if (C::kOutBytes == 1 || (C::kOutBytes == 0 && p.out_dtype == Dtype::kE4m3)) {
      store_sums<C>(E4m3{}, p, at.head, column, lane_row, end, value_of, out_multiplier);
    } else if constexpr (C::kOutBytes != 1) {
      store_sums<C>(typename S::Element{}, p, at.head, column, lane_row, end, value_of, 1.0f);
    }
  }
}

template <class C>
MLA_FP8_DEVICE void run_pipelined(const Params& params, typename C::Shared& shared) {
  const Product& p = params.product;
  const Place at = place_of(p.heads, static_cast<u32>(p.n) / C::kTileN);
  const Items<C> items{static_cast<u32>(at.row_tile) * C::kTileM, static_cast<u32>(at.row_step) * C::kTileM,
                       static_cast<u32>(p.s)};
  begin_with_weights<C>(params, shared, at, items.has_more());
  if (!items.has_more()) return;
  if (threadIdx.x < C::kSplitters) {
    ptx::setmaxnreg_dec<C::kSplitterRegisters>();
    with_split<C::kMostTerms>(p.terms, p.x_dtype == Dtype::kFp16,
                              [&](auto split) { split_items<C, decltype(split)>(p, shared, at.head, items); });
  } else {
    ptx::setmaxnreg_inc<C::kMultiplierRegisters>();
    with_split<C::kMostTerms>(p.terms, p.x_dtype == Dtype::kFp16,
                              [&](auto split) { multiply_items<C, decltype(split)>(p, shared, at, items); });
  }
}

}  // namespace mla_fp8::sm90
