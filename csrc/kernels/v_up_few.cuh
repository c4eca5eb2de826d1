// v_up and v_up_quantized (formula, tensors, cost, numerics: v_up.cuh) for R = 512 and few rows: operands swapped (few_rows.cuh).
//
// Grid      a CTA holds W_UV[h] and takes the row tiles of kTokens rows (config/tiles.h).
// Warps     all threads load and quantize the rows, a warp one row at a time; then a warpgroup multiplies its 64 weight rows by them, a product for each of
//           R's four blocks, adds the products, k ascending and by the same fused multiply-adds as kloop.cuh, and stores two neighbouring columns a lane.
// Pipeline  barrier    producer -> consumer                      arrivals  bytes
//           full[k]    copy engine -> all                        1         16384, once a launch
//           CTA        rows and scales written -> all read       256       - (one more for v_scale)
// Shared memory  w_uv 64 KiB, rows 512 kTokens (e4m3), both 128-byte swizzle; scale 16 kTokens, amax 32 kTokens.
#pragma once

#include "kernels/few_rows.cuh"
#include "kernels/ptx/griddepcontrol.cuh"
#include "kernels/v_up.h"

namespace mla_fp8::v_up {

// By one thread: W_UV[h]'s block of 128 along R, to L2 and then to shared memory.
template <int kTokens>
MLA_FP8_DEVICE void prefetch_block(const Params& p, FewRowsStorage<kTokens>& shared, int block, i32 first_column,
                                   i32 head) {
  ptx::prefetch_tensormap(&p.w_uv);
#pragma unroll
  for (int i = 0; i < kFewWarpgroups; ++i)
    few_rows::prefetch_weights<1>(&p.w_uv, block * kloop::kTileK, first_column + i * few_rows::kTileRows, head);
  ptx::mbarrier_init(&shared.full[block], 1);
  ptx::fence_mbarrier_init_release_cluster();
}

template <int kTokens>
MLA_FP8_DEVICE void load_block(const Params& p, FewRowsStorage<kTokens>& shared, int block, i32 first_column,
                               i32 head) {
  ptx::mbarrier_arrive_expect_tx(&shared.full[block], kFewWarpgroups * few_rows::kTileBytes);
#pragma unroll
  for (int i = 0; i < kFewWarpgroups; ++i) {
    few_rows::load_weights<1>(&shared.w_uv[block][i], &p.w_uv, block * kloop::kTileK,
                              first_column + i * few_rows::kTileRows, head, &shared.full[block]);
  }
}

// A pass's scales: of a token over its row of 128 values, of which a lane has two columns; to v_scale and, as multipliers, to shared memory.
template <int kTokens, int kPass>
MLA_FP8_DEVICE void share_scales(const Params& p, FewRowsStorage<kTokens>& shared, const float (&value)[kPass / 4][2],
                                 i64 first_row, int pass, i32 head, const few_rows::Lane& lane) {
#pragma unroll
  for (int i = 0; i < kPass / 4; ++i) {
    float amax = ptx::max_nan_f32(fabsf(value[i][0]), fabsf(value[i][1]));
#pragma unroll
    for (int lanes = kQuad; lanes < 32; lanes *= 2)
      amax = ptx::max_nan_f32(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
    if (threadIdx.x % 32 < kQuad) shared.amax[threadIdx.x / 32][pass + i / 2 * 8 + lane.token + i % 2] = amax;
  }
  __syncthreads();
  if (threadIdx.x < kPass) {
    const int token = pass + threadIdx.x;
    float amax = 0;
#pragma unroll
    for (const auto& warp_amax : shared.amax) amax = ptx::max_nan_f32(amax, warp_amax[token]);
    const float scale = group_scale(amax);
    shared.multiplier[token] = group_multiplier(scale);
    if (first_row + token < p.s)
      p.v_scale[(first_row + token) * p.v_scale_stride[0] + head * p.v_scale_stride[1]] = scale;
  }
  __syncthreads();
}

template <class Config>
MLA_FP8_DEVICE void run_few(const Params& p, typename Config::Shared& shared) {
  constexpr int kTokens = Config::kTokens, kOutBytes = Config::kOutBytes;
  constexpr int kSlots = kTokens * kBlocks * kParts / kFewThreads;
  constexpr int kPass = kTokens < 32 ? kTokens : 32;  // tokens whose products a thread keeps
  constexpr int kRowThreads = kFewLanes;
  static_assert(kRowThreads == kBlocks * kParts);
  const i32 slices = p.v_dim / kloop::kTileN;
  const Place at = place_of(p.h, slices);
  const int warpgroup = threadIdx.x / kloop::kWarpgroup;
  const i32 first_column = at.slice * kloop::kTileN;
  const bool is_producer = threadIdx.x % 64 == 32;  // of a block: one warp of two
  const int own_block = threadIdx.x / 64;
  if (is_producer) prefetch_block(p, shared, own_block, first_column, at.head);
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (at.row_tile * kTokens >= p.s) return;
  if (is_producer) load_block(p, shared, own_block, first_column, at.head);
  __syncwarp();

  const few_rows::Lane lane = few_rows::lane_of<1>();
  const i32 column = first_column + warpgroup * few_rows::kTileRows + lane.column;
  const int part = threadIdx.x % kParts;
  const int load_block = threadIdx.x % kRowThreads / kParts;
  const int load_row = threadIdx.x / kRowThreads;
  const u16* from =
      p.o_latent + at.head * p.o_latent_stride[1] + load_row * p.o_latent_stride[0] + load_block * kloop::kTileK;
  const float* w_scale_from = p.w_uv_scale + at.head * p.w_uv_scale_stride[0] + at.slice * p.w_uv_scale_stride[1];
  for (i64 first_row = at.row_tile * kTokens; first_row < p.s;) {
    shared_rows::Raw raw[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const i64 row = first_row + i * (kFewThreads / kRowThreads);
      shared_rows::load(raw[i], from + row * p.o_latent_stride[0], part, row + load_row < p.s);
    }
    float w_scale[kBlocks];
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) w_scale[k] = w_scale_from[k * p.w_uv_scale_stride[2]];
    const float multiplier = kOutBytes == 1 && p.out_scale != nullptr ? __frcp_rn(*p.out_scale) : 1.0f;
    shared_rows::quantize<kFewThreads / kRowThreads>(shared.rows[load_block], shared.scale[load_block], raw,
                                                     p.is_fp16 != 0, load_row, part);
    ptx::fence_proxy_async_shared_cta();
    __syncthreads();
    const bool has_v_scale = kOutBytes == 1 && p.v_scale != nullptr;
#pragma unroll 1
    for (int pass = 0; pass < kTokens; pass += kPass) {
      float product[kBlocks][kPass / 2];
      ptx::wgmma_fence_sync_aligned();
#pragma unroll
      for (int k = 0; k < kBlocks; ++k) {
        wait(&shared.full[k], 0);
        few_rows::multiply<kPass>(product[k], shared.w_uv[k][warpgroup], shared.rows[k] + pass * kloop::kTileK);
      }
      ptx::wgmma_commit_group_sync_aligned();
      ptx::wgmma_wait_group_sync_aligned<0>();
      float value[kPass / 4][2] = {};
#pragma unroll
      for (int i = 0; i < kPass / 4; ++i) {
        const int token = pass + i / 2 * 8 + lane.token + i % 2;
#pragma unroll
        for (int k = 0; k < kBlocks; ++k) {
          const float scale = __fmul_rn(shared.scale[k][token], w_scale[k]);
#pragma unroll
          for (int c = 0; c < 2; ++c)
            value[i][c] = __fmaf_rn(product[k][i / 2 * 4 + c * 2 + i % 2], scale, value[i][c]);
        }
      }
      if (has_v_scale) {
        share_scales<kTokens, kPass>(p, shared, value, first_row, pass, at.head, lane);
      }
#pragma unroll
      for (int i = 0; i < kPass / 4; ++i) {
        const int token = pass + i / 2 * 8 + lane.token + i % 2;
        const i64 row = first_row + token;
        if (row >= p.s) continue;
        u8* to = static_cast<u8*>(p.v) + (row * p.v_stride[0] + at.head * p.v_stride[1] + column) * kOutBytes;
        few_rows::store<kOutBytes>(to, value[i], has_v_scale ? shared.multiplier[token] : multiplier, p.is_fp16 != 0);
      }
    }
    first_row += at.row_step * kTokens;
    if (first_row < p.s) __syncthreads();  // all have read the rows and scales
  }
}

}  // namespace mla_fp8::v_up
