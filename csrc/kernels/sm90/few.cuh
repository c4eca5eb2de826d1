// FewRows: few rows a head, with swap AB.
//
// 1. Formula   out[s,h,:n] = sum over blocks k of  x_scale[k] * w_scale[n/128,k]
//                            * (terms of x[s,h,128 k..] . w[h,:,128 k..]), rounded once
//
// 2. Tensors   as in product.h; x, q_pe and out aligned to 16 bytes.
//
// 3. Grid      A CTA holds kTileN columns of one head's weights and takes row tiles of kTokens rows
//              (grid.cuh).
//
// 4. Warps     All threads load and split the rows, 8 threads a row and block, and copy q_pe.
//              Then each warpgroup multiplies its kTiles tiles of 64 weight rows by them. The
//              weights are wgmma's A, so a thread keeps kTokens / 2 sums of a tile and block, and a
//              CTA so little that the next launch's CTAs fit beside it and bring their weights to
//              L2 before the wait. In each warpgroup the last kBlocks warps, which have the fewest
//              rows, start the copy of one block each.
//              Lane 4 g + t of warp w has rows 16 w + g + 8 e and columns 8 b + 2 t + {0, 1} of D,
//              as sums 4 b + 2 e + {0, 1}. It stores 2 kTiles neighbouring columns of a token
//              (weight_order.h).
//
// 5. Pipeline  barrier                 producer -> consumer              arrivals     bytes
//              full[warpgroup][block]  copy engine -> the warpgroup      1            8192 kTiles
//              CTA                     rows, scales written -> all read  all threads  -
//              CTA                     all have read -> written again    all threads  -
//              full completes once a launch. Where a row shares a scale, two more CTA barriers
//              exchange the warps' amax and the rows' multipliers.
//
// 6. Shared memory   w 8192 bytes a tile and block, rows 128 kTokens a block and term, both in the
//              128-byte swizzle; the rows' scales; amax and multipliers; barriers.
//
// 7. Cost      Bytes: x and out once, weights once a CTA. Bound by memory, and at few rows by what
//              surrounds a launch.
//
// 8. Numerics  The 1x128 quantization of docs/numerics.md, or its exact terms; sums of the tensor
//              core over 128, the least term first, in one accumulator; one fp32 product of the
//              scales and one fused multiply-add a block, k ascending; one rounding. A zero row
//              gives zeros; a NaN or Inf makes its own row NaN and no other.
#pragma once

#include "kernels/sm90/pe.cuh"
#include "kernels/sm90/rows.cuh"
#include "kernels/sm90/weights.cuh"

namespace mla_fp8::sm90 {

// Where a thread's values are: its first column of the warpgroup's, its first token of every 8.
struct SwappedLane {
  int column, token;
  MLA_FP8_DEVICE int token_of(int i) const { return i / 2 * 8 + token + i % 2; }
};

template <class C>
using Tokens = float[C::kTileM / 4][C::kLaneColumns];  // a lane's tokens and their columns

// The warpgroup's weight tiles times the rows. Every block of k is scaled, k ascending.
template <class C, int kTerms>
MLA_FP8_DEVICE void multiply_terms(Tokens<C>& value, typename C::Shared& shared, int warpgroup,
                                   const float (&w_scale)[C::kBlocks], const SwappedLane& lane) {
  constexpr int kTokens = C::kTileM;
  float product[C::kBlocks][C::kTiles][kTokens / 2];
#pragma unroll
  for (int k = 0; k < C::kBlocks; ++k) {
    wait(&shared.full[warpgroup][k], 0);
    // After every wait: a branch between it and wgmma makes the compiler run the wgmmas one by one.
    ptx::wgmma_fence_sync_aligned();
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i)
      multiply_group<kTokens, kTerms>(product[k][i], shared.w[warpgroup][k][i], 0, shared.rows[0][k], C::kPlaneBytes);
  }
  ptx::wgmma_commit_group_sync_aligned();
  ptx::wgmma_wait_group_sync_aligned<0>();
#pragma unroll
  for (int i = 0; i < kTokens / 4; ++i) {
#pragma unroll
    for (float& sum : value[i]) sum = 0;
#pragma unroll
    for (int k = 0; k < C::kBlocks; ++k) {
      const float scale = __fmul_rn(shared.scale[k][lane.token_of(i)], w_scale[k]);
#pragma unroll
      for (int c = 0; c < C::kLaneColumns; ++c)
        value[i][c] = __fmaf_rn(product[k][c / 2][i / 2 * 4 + c % 2 * 2 + i % 2], scale, value[i][c]);
    }
  }
}

template <class C, class... Arguments>
MLA_FP8_DEVICE void multiply_tokens(i32 terms, Tokens<C>& value, Arguments&&... arguments) {
  with_terms<C::kMostTerms>(terms, [&](auto count) { multiply_terms<C, count.kCount>(value, arguments...); });
}

// Writes the scales of rows of 128 values, of which a lane has kLaneColumns a token, to
// out_row_scale and, as multipliers, to shared memory.
template <class C>
MLA_FP8_DEVICE void share_row_scales(const Product& p, typename C::Shared& shared, const Tokens<C>& value,
                                     i64 first_row, i32 head, const SwappedLane& lane) {
#pragma unroll
  for (int i = 0; i < C::kTileM / 4; ++i) {
    const float amax = amax_of_lanes<kQuad, kWarp>(value[i]);
    if (threadIdx.x % kWarp < kQuad) shared.amax[threadIdx.x / kWarp][lane.token_of(i)] = amax;
  }
  __syncthreads();
  if (threadIdx.x < C::kTileM) {
    float amax = 0;
#pragma unroll
    for (const auto& warp_amax : shared.amax) amax = ptx::max_nan_f32(amax, warp_amax[threadIdx.x]);
    const float scale = group_scale(amax);
    shared.multiplier[threadIdx.x] = group_multiplier(scale);
    const i64 row = first_row + threadIdx.x;
    if (row < p.s) p.out_row_scale[row * p.out_row_scale_stride[0] + head * p.out_row_scale_stride[1]] = scale;
  }
  __syncthreads();
}

// A thread's rows of a tile: loaded, then split to shared memory.
template <class C>
struct FewRowsLoader {
  const Product& p;
  const u16* from;  // the head's
  RowPart part[C::kSlots];

  static MLA_FP8_DEVICE int lane() { return threadIdx.x % kParts; }
  static MLA_FP8_DEVICE int block() { return threadIdx.x / kParts % C::kBlocks; }
  static MLA_FP8_DEVICE int row() { return threadIdx.x / C::kRowLanes; }
  static MLA_FP8_DEVICE bool has_rows() { return C::kTileM >= C::kRowsAtOnce || row() < C::kTileM; }

  MLA_FP8_DEVICE void load(i64 first_row) {
    if (!has_rows()) return;
#pragma unroll
    for (int i = 0; i < C::kSlots; ++i) {
      const i64 at = first_row + row() + i * C::kRowsAtOnce;
      load_part(part[i], from + at * p.x_stride[0] + block() * kGroup, lane(), at < p.s);
    }
  }

  MLA_FP8_DEVICE void split_to(typename C::Shared& shared) const {
    if (!has_rows()) return;
    with_split<C::kMostTerms>(p.terms, p.x_dtype == Dtype::kFp16, [&](auto split) {
#pragma unroll
      for (int i = 0; i < C::kSlots; ++i) {
        const int at = row() + i * C::kRowsAtOnce;
        split_part<decltype(split), C::kPlaneBytes>(shared.rows[0][block()], &shared.scale[block()][at], part[i], at,
                                                    lane());
      }
    });
    ptx::fence_proxy_async_shared_cta();
  }
};

template <class C>
MLA_FP8_DEVICE void run_few(const Params& params, typename C::Shared& shared) {
  using Store = typename C::Store;
  constexpr int kTokens = C::kTileM;
  const Product& p = params.product;
  const i32 slices = static_cast<i32>(p.n) / C::kTileN;
  const Place at = place_of(p.heads, slices);
  const int warpgroup = threadIdx.x / kWarpgroup;
  const i32 first_column = at.slice * C::kTileN + warpgroup * C::kWarpgroupN;
  const int own_block = kWarpgroupWarps - 1 - threadIdx.x / kWarp % kWarpgroupWarps;
  const bool is_producer = threadIdx.x % kWarp == 0 && own_block < C::kBlocks;
  const WeightPlace weights{own_block * kGroup, first_column, at.head};
  begin(is_producer, [&] {
    ptx::prefetch_tensormap(&params.w);
    prefetch_weights<C, C::kWarpgroupN>(params, weights, &shared.full[warpgroup][own_block]);
  });
  if (at.row_tile * kTokens >= p.s) return;
  if (is_producer) {
    load_weights<C, C::kWarpgroupN>(params, weights, shared.w[warpgroup][own_block][0],
                                    &shared.full[warpgroup][own_block]);
  }
  __syncwarp();

  const SwappedLane lane{static_cast<int>(threadIdx.x % kWarpgroup / kQuad * C::kLaneColumns),
                         static_cast<int>(threadIdx.x % kQuad * 2)};
  const i32 column = first_column + lane.column;
  Pe<kTokens, C::kThreads, true, C::kOutBytes> pe{p, at.head, at.slice, slices};
  FewRowsLoader<C> rows{p, static_cast<const u16*>(p.x) + at.head * p.x_stride[1]};
  const float* w_scale_from = p.w_scale + at.head * p.w_scale_stride[0] + column / kChunkN * p.w_scale_stride[1];
  for (i64 first_row = at.row_tile * kTokens; first_row < p.s;) {
    rows.load(first_row);
    PeChunk chunk;
    if (Store::kPe && p.pe != 0) chunk = pe.load(first_row, 0);
    float w_scale[C::kBlocks];
#pragma unroll
    for (int k = 0; k < C::kBlocks; ++k) w_scale[k] = w_scale_from[k * p.w_scale_stride[2]];
    pe.multiplier = read_multiplier<Store>(p);
    rows.split_to(shared);
    if (Store::kPe && p.pe != 0) {
      pe.store(chunk);
      pe.copy_from(first_row, 1);
    }
    __syncthreads();
    Tokens<C> value;
    multiply_tokens<C>(p.terms, value, shared, warpgroup, w_scale, lane);
    with_output<Store, true>(p, [&](auto element) {
      const bool has_row_scale = element.kBytes == 1 && Store::kRowScale && p.out_row_scale != nullptr;
      if (has_row_scale) share_row_scales<C>(p, shared, value, first_row, at.head, lane);
#pragma unroll
      for (int i = 0; i < kTokens / 4; ++i) {
        const i64 row = first_row + lane.token_of(i);
        const float multiplier = has_row_scale ? shared.multiplier[lane.token_of(i)] : pe.multiplier;
        const i64 out_at = row * p.out_stride[0] + at.head * p.out_stride[1] + column;
        store_values<true, C::kLaneColumns>(element, p.out, out_at, value[i], multiplier, row < p.s);
      }
    });
    first_row += at.row_step * kTokens;
    if (first_row < p.s) __syncthreads();  // all have read the rows and scales
  }
}

}  // namespace mla_fp8::sm90
