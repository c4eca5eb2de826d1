// SharedRows: some or many rows a head where k is 128, split once for all warpgroups of a CTA.
//
// 1. Formula   that of few.cuh
//
// 2. Tensors   as in product.h; x, q_pe and out aligned to 16 bytes.
//
// 3. Grid      A CTA holds kTileN columns of one head's weights and takes row tiles of 64 rows
//              (grid.cuh).
//
// 4. Warps     All threads bring the rows, 8 threads a row. Each brings what it splits itself, and
//              the next rows come while the present ones are worked on. Then each warpgroup
//              multiplies, scales and stores its kChunks times 128 columns. q_pe comes through
//              registers, two row tiles ahead. kStages warps start the copy of one weight tile
//              each. Registers: a product of 64.
//
// 5. Pipeline  barrier         producer -> consumer                 arrivals     bytes
//              full[tile]      copy engine -> its warpgroups        1            16384
//              cp.async batch  a thread -> itself                   -            32 kSlots a thread
//              CTA             planes, scales written -> all read   all threads  -
//              CTA             all have read -> written again       all threads  -
//              full completes once a launch. kAhead batches of a row tile each are under way; with
//              kAhead = 0 rows come to registers, one row tile ahead. Where the launch's terms
//              leave room for the planes of two row tiles, these alternate, and the second CTA
//              barrier is not needed.
//
// 6. Shared memory   w 16384 bytes a tile of 128 x 128; kPlanes planes of 8192 bytes; what is ahead;
//              scales; barriers.
//
// 7. Cost      Bytes: x and out once, weights once a CTA. Bound by memory.
//
// 8. Numerics  those of few.cuh, bit for bit.
#pragma once

#include "kernels/sm90/lanes.cuh"
#include "kernels/sm90/pe.cuh"
#include "kernels/sm90/rows.cuh"
#include "kernels/sm90/sums.cuh"
#include "kernels/sm90/weights.cuh"

namespace mla_fp8::sm90 {

template <class C>
using PeOf = Pe<C::kTileM, C::kThreads, true, C::kOutBytes>;

// A thread's share of the row tiles to come: in its own places of a ring in shared memory, or in
// registers if kAhead is 0.
template <class C>
struct RowsAhead {
  const Product& p;
  typename C::Shared& shared;
  const u16* from;  // the head's
  int stage = 0;  // of the oldest tile under way, which is taken and then fetched over
  RowPart part[C::kSlots];

  static MLA_FP8_DEVICE int lane() { return threadIdx.x % kParts; }
  static MLA_FP8_DEVICE int row(int slot) { return threadIdx.x / kParts + slot * C::kSlotRows; }

  // The row tile from first_row on, unless it begins at s or later.
  MLA_FP8_DEVICE void fetch(u64 first_row) {
    if (first_row < static_cast<u32>(p.s)) {
#pragma unroll
      for (int i = 0; i < C::kSlots; ++i) {
        const u32 at = static_cast<u32>(first_row) + row(i);
        const bool exists = at < static_cast<u32>(p.s);
        const u16* group = from + (exists ? at : 0) * p.x_stride[0];
        if constexpr (C::kAhead == 0) {
          load_part(part[i], group, lane(), exists);
        } else {
          copy_part(shared.ahead[stage][i], group, lane(), exists);
        }
      }
    }
    if constexpr (C::kAhead != 0) {
      ptx::cp_async_commit_group();
      stage = stage + 1 == C::kAhead ? 0 : stage + 1;
    }
  }

  MLA_FP8_DEVICE void start(u32 first_row, u32 step) {
#pragma unroll
    for (int i = 0; i < C::kUnderWay; ++i) fetch(first_row + u64{1} * i * step);
  }

  // Waits for the oldest tile, whose rows are then in `part`. With kAhead = 0 the next tile is
  // fetched into the same registers, after split_to().
  MLA_FP8_DEVICE void take() {
    if constexpr (C::kAhead != 0) {
      ptx::cp_async_wait_group<C::kAhead - 1>();
#pragma unroll
      for (int i = 0; i < C::kSlots; ++i) take_part(part[i], shared.ahead[stage][i]);
    }
  }

  template <class S>
  MLA_FP8_DEVICE void split_to(u8* planes, float* scales) const {
#pragma unroll
    for (int i = 0; i < C::kSlots; ++i) split_part<S, C::kPlaneBytes>(planes, scales + row(i), part[i], row(i), lane());
  }
};

// The q_pe of the next two row tiles, in registers.
template <class C>
struct PeAhead {
  const PeOf<C>& pe;
  u32 word[2][C::kPeSlots][4];

  // To ahead `i`: the row tile from first_row on, unless it begins at s or later.
  MLA_FP8_DEVICE void fetch(int i, u64 first_row) {
    if (first_row >= static_cast<u32>(pe.p.s)) return;
#pragma unroll
    for (int j = 0; j < C::kPeSlots; ++j) {
      const PeChunk chunk = pe.place(static_cast<u32>(first_row), j);
      if (chunk.exists) load_vector<true>(word[i][j], pe.source(chunk));
    }
  }

  MLA_FP8_DEVICE void store_and_fetch(u32 first_row, u32 step) {
#pragma unroll
    for (int j = 0; j < C::kPeSlots; ++j) {
      PeChunk chunk = pe.place(first_row, j);
#pragma unroll
      for (int k = 0; k < 4; ++k) chunk.word[k] = word[0][j][k], word[0][j][k] = word[1][j][k];
      pe.store(chunk);
    }
    fetch(1, first_row + u64{2} * step);
  }
};

// The warpgroup's columns of a row tile: multiplied, scaled, stored.
template <class C, int kTerms>
MLA_FP8_DEVICE void multiply_and_store(const Product& p, typename C::Shared& shared, const u8* planes,
                                       const float* scales, const float (&w_scale)[C::kChunks], int first_chunk,
                                       const Place& at, u32 first_row, float out_multiplier) {
  const LanePlace lane = lane_place();
  const u32 row = first_row + lane.row;
#pragma unroll
  for (int c = 0; c < C::kChunks; ++c) {
    float product[64];
    wait(&shared.full[first_chunk + c], 0);
    ptx::wgmma_fence_sync_aligned();  // after every wait, as in few.cuh
    multiply_group<kChunkN, kTerms>(product, planes, C::kPlaneBytes, shared.w[first_chunk + c], 0);
    ptx::wgmma_commit_group_sync_aligned();
    const float scale[] = {__fmul_rn(scales[lane.row], w_scale[c]),
                           __fmul_rn(scales[lane.row + kLaneRowStep], w_scale[c])};
    ptx::wgmma_wait_group_sync_aligned<0>();
    // From +0, as a sum of blocks begins.
    const auto value_of = [&](int i) { return __fmaf_rn(product[i], scale[i / 2 % 2], 0.0f); };
    // The 16-bit format is looked at in each store: two copies of these would spill.
    with_output<typename C::Store, /*kOneFormat=*/false>(p, [&](auto element) {
      store_sums<C>(element, p, at.head, at.slice * C::kTileN + (first_chunk + c) * kChunkN, row, static_cast<u32>(p.s),
                    value_of, out_multiplier);
    });
  }
}

template <class C>
MLA_FP8_DEVICE void run_shared(const Params& params, typename C::Shared& shared) {
  const Product& p = params.product;
  const i32 slices = static_cast<i32>(p.n) / C::kTileN;
  const Place at = place_of(p.heads, slices);
  const u32 s = static_cast<u32>(p.s);  // below 2^31, so that no sum of a row and a step wraps
  const u32 step = static_cast<u32>(at.row_step) * C::kTileM;
  u32 first_row = static_cast<u32>(at.row_tile) * C::kTileM;
  begin_with_weights<C>(params, shared, at, first_row < s);
  if (first_row >= s) return;

  PeOf<C> pe{p, at.head, at.slice, slices};
  const bool has_pe = C::Store::kPe && p.pe != 0;
  RowsAhead<C> rows{p, shared, static_cast<const u16*>(p.x) + at.head * p.x_stride[1]};
  PeAhead<C> pe_ahead{pe};
  rows.start(first_row, step);
  if (has_pe) pe_ahead.fetch(0, first_row), pe_ahead.fetch(1, first_row + u64{1} * step);
  const int first_chunk = threadIdx.x / kWarpgroup * C::kChunks;  // the warpgroup's
  float w_scale[C::kChunks];
  read_weight_scales<C>(w_scale, p, at, first_chunk);
  pe.multiplier = read_multiplier<typename C::Store>(p);
  const int buffers = C::kPlanes / p.terms;  // that alternate, if there are two
  for (int buffer = 0; first_row < s; first_row += step) {
    u8* planes = shared.planes[buffer * p.terms];
    rows.take();
    if (C::kAhead != 0) rows.fetch(first_row + u64{C::kUnderWay} * step);
    with_split<C::kMostTerms>(p.terms, p.x_dtype == Dtype::kFp16, [&](auto split) {
      rows.template split_to<decltype(split)>(planes, shared.scale[buffer]);
    });
    ptx::fence_proxy_async_shared_cta();
    __syncthreads();
    if (C::kAhead == 0) rows.fetch(first_row + u64{1} * step);
    if (has_pe) {
      pe_ahead.store_and_fetch(first_row, step);
      pe.copy_from(first_row, C::kPeSlots);
    }
    with_terms<C::kMostTerms>(p.terms, [&](auto terms) {
      multiply_and_store<C, terms.kCount>(p, shared, planes, shared.scale[buffer], w_scale, first_chunk, at, first_row,
                                          pe.multiplier);
    });
    if (buffers > 1) {
      buffer ^= 1;
    } else {
      __syncthreads();  // all have read the planes
    }
  }
}

}  // namespace mla_fp8::sm90
