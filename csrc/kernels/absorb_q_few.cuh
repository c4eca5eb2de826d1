// absorb_q (formula, tensors, cost, numerics: absorb_q.cuh) for D = 128 and few rows: operands swapped (few_rows.cuh).
//
// Grid      a CTA holds kTileN columns of one head's W_UK and takes the row tiles of kTokens rows (config/tiles.h).
// Warps     the first 8 kTokens threads load and quantize the rows, all copy q_pe; then a warpgroup multiplies its kTiles tiles of 64 weight rows by
//           them, scales and stores 2 kTiles neighbouring columns a lane. A lane of each warpgroup's last warp starts the copy of its weights.
// Pipeline  barrier    producer -> consumer                      arrivals      bytes
//           full[w]    copy engine -> warpgroup w                1             8192 kTiles, once a launch
//           CTA        rows and scales written -> all read       all threads   -
// Shared memory  w_uk 8192 bytes a tile, rows 128 kTokens (e4m3), both 128-byte swizzle; scale 4 kTokens; full 8 a warpgroup.
#pragma once

#include "kernels/absorb_q.h"
#include "kernels/few_rows.cuh"
#include "kernels/pe.cuh"
#include "kernels/ptx/griddepcontrol.cuh"

namespace mla_fp8::absorb_q {

// A lane's columns of each of its tokens.
template <class Config>
MLA_FP8_DEVICE void store_tokens(const Params& p, const float* row_scale,
                                 const float (&sums)[Config::kTiles][Config::kTokens / 2], float w_scale, i64 first_row,
                                 i32 head, i32 column, float multiplier, int first_token) {
  constexpr int kTokens = Config::kTokens, kColumns = 2 * Config::kTiles;
#pragma unroll
  for (int i = 0; i < kTokens / 4; ++i) {
    const int token = i / 2 * 8 + first_token + i % 2;
    const i64 row = first_row + token;
    const float scale = __fmul_rn(row_scale[token], w_scale);
    float value[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) value[c] = __fmaf_rn(sums[c / 2][i / 2 * 4 + c % 2 * 2 + i % 2], scale, 0.0f);
    if (row >= p.s) continue;
    u8* to = static_cast<u8*>(p.q) + (row * p.q_stride[0] + head * p.q_stride[1] + column) * Config::kOutBytes;
    few_rows::store<Config::kOutBytes>(to, value, multiplier, p.is_fp16 != 0);
  }
}

template <class Config>
MLA_FP8_DEVICE void run_few(const Params& p, typename Config::Shared& shared) {
  constexpr int kTokens = Config::kTokens, kTiles = Config::kTiles, kThreads = Config::kThreads;
  const i32 slices = p.r / Config::kTileN;
  const Place at = place_of(p.h, slices);
  const int warpgroup = threadIdx.x / kWarpgroup;
  const i32 first_column = at.slice * Config::kTileN + warpgroup * Config::kWarpgroupN;
  const bool is_producer = threadIdx.x % kWarpgroup == kWarpgroup - 32;
  if (is_producer) {
    ptx::prefetch_tensormap(&p.w_uk);
    few_rows::prefetch_weights<kTiles>(&p.w_uk, 0, first_column, at.head);
    ptx::mbarrier_init(&shared.full[warpgroup], 1);
    ptx::fence_mbarrier_init_release_cluster();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (at.row_tile * kTokens >= p.s) return;
  if (is_producer) {
    ptx::mbarrier_arrive_expect_tx(&shared.full[warpgroup], kTiles * few_rows::kTileBytes);
    few_rows::load_weights<kTiles>(shared.w_uk[warpgroup], &p.w_uk, 0, first_column, at.head, &shared.full[warpgroup]);
  }
  __syncwarp();

  const few_rows::Lane lane = few_rows::lane_of<kTiles>();
  const i32 column = first_column + lane.column;
  const int part = threadIdx.x % kParts;
  const int load_row = threadIdx.x / kParts;
  const bool quantizes = Config::kLanes >= kThreads || threadIdx.x < Config::kLanes;
  const u16* from = p.q_nope + at.head * p.q_nope_stride[1] + load_row * p.q_nope_stride[0];
  const float* w_scale_from =
      p.w_uk_scale + at.head * p.w_uk_scale_stride[0] + column / kChunkN * p.w_uk_scale_stride[1];
  for (i64 first_row = at.row_tile * kTokens; first_row < p.s;) {
    shared_rows::Raw raw[Config::kSlots];
    if (quantizes) {
#pragma unroll
      for (int i = 0; i < Config::kSlots; ++i) {
        const i64 row = first_row + i * (kThreads / kParts);
        shared_rows::load(raw[i], from + row * p.q_nope_stride[0], part, row + load_row < p.s);
      }
    }
    PeChunk pe;
    if (p.pe != 0) pe = load_pe<kVectorBytes, kTokens>(p, first_row, at.head, pe_index<kThreads>(at.slice, slices, 0));
    const float w_scale = *w_scale_from;
    const float multiplier = Config::kOutBytes == 1 ? __frcp_rn(*p.out_scale) : 1.0f;
    if (quantizes) {
      shared_rows::quantize<kThreads / kParts>(shared.rows, shared.scale, raw, p.is_fp16 != 0, load_row, part);
      ptx::fence_proxy_async_shared_cta();
    }
    if (p.pe != 0) {
      store_pe<Config::kOutBytes, kVectorBytes>(p, pe, at.head, multiplier);
      copy_pe<Config::kOutBytes, kVectorBytes, kThreads, kTokens>(p, first_row, at.head, at.slice, slices, 1,
                                                                  multiplier);
    }
    __syncthreads();
    wait(&shared.full[warpgroup], 0);
    float sums[kTiles][kTokens / 2];
    ptx::wgmma_fence_sync_aligned();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) few_rows::multiply<kTokens>(sums[i], shared.w_uk[warpgroup][i], shared.rows);
    ptx::wgmma_commit_group_sync_aligned();
    ptx::wgmma_wait_group_sync_aligned<0>();
    store_tokens<Config>(p, shared.scale, sums, w_scale, first_row, at.head, column, multiplier, lane.token);
    first_row += at.row_step * kTokens;
    if (first_row < p.s) __syncthreads();  // all have read the rows
  }
}

}  // namespace mla_fp8::absorb_q
