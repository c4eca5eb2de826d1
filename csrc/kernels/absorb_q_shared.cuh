// absorb_q (formula, tensors, cost, numerics: absorb_q.cuh) for D = 128 and some rows, where what surrounds a launch decides: half of an SM is left, so
// that the next launch's CTAs start beside these and bring their weights to L2 before griddepcontrol_wait.
//
// Grid      a CTA holds 128 kWarpgroups kChunks columns of one head's W_UK and takes the row tiles of 64 rows.
// Warps     all threads quantize the rows (shared_rows.cuh), a thread what it brought itself; then warpgroup w multiplies, scales and stores its kChunks
//           times 128 columns, and q_pe after them. Registers: 64 accumulators.
// Pipeline  barrier        producer -> consumer                      arrivals      bytes
//           full[w][c]     copy engine -> warpgroup w                1             16384, once a launch
//           cp.async batch a thread -> itself                        -             32 a row, kSharedStages batches under way
//           CTA            rows and scales written -> all read       all threads   -; two buffers in turn, so one barrier a tile
// Shared memory  w_uk 16384 bytes a chunk, rows 2 x 8192 (e4m3), both 128-byte swizzle; stage 16384 each; scale 512; full 8 a chunk.
#pragma once

#include "kernels/absorb_q.cuh"
#include "kernels/absorb_q_phased.cuh"
#include "kernels/shared_rows.cuh"

namespace mla_fp8::absorb_q {

// 128 columns of a row tile: rows times weights, scaled and stored.
template <class Config>
MLA_FP8_DEVICE void multiply_and_store(const Params& p, const u8* rows, const float* row_scale, const u8* weights,
                                       float w_scale, i64 first_row, i32 head, i32 column, float multiplier,
                                       const LanePlace& lane) {
  float values[64];
  start_multiply(values, rows, weights);
  float scale[kLaneRows];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    scale[i] = __fmul_rn(row_scale[lane.row + i * kLaneRowStep], w_scale);
  }
  ptx::wgmma_wait_group_sync_aligned<0>();
  store_products<Config::kOutBytes, kVectorBytes>(p, values, scale, first_row + lane.row, head, column, multiplier,
                                                  lane.quad);
}

// The CTA's share of a row tile's q_pe: what a thread fetched, then what is left.
template <class Config>
MLA_FP8_DEVICE void store_rows_pe(const Params& p, const Place& at, i32 slices, const u32 (&pe)[Config::kSlots][4],
                                  i64 first_row, float multiplier) {
#pragma unroll
  for (int i = 0; i < Config::kSlots; ++i) {
    PeChunk chunk = pe_chunk(p, first_row, pe_index<Config::kThreads>(at.slice, slices, i));
#pragma unroll
    for (int j = 0; j < 4; ++j) chunk.word[j] = pe[i][j];
    store_pe<Config::kOutBytes, kVectorBytes>(p, chunk, at.head, multiplier);
  }
  copy_pe<Config::kOutBytes, kVectorBytes, Config::kThreads>(p, first_row, at.head, at.slice, slices, Config::kSlots,
                                                             multiplier);
}

template <class Config>
MLA_FP8_DEVICE void run_shared(const Params& p, typename Config::Shared& shared) {
  const i32 slices = p.r / Config::kTileN;
  const Place at = place_of(p.h, slices);
  const bool is_producer = threadIdx.x == Config::kThreads - 32;
  const int warpgroup = threadIdx.x / kWarpgroup;
  const i32 first_column = at.slice * Config::kTileN;
  if (is_producer) {
    prefetch_weights<Config::kOutBytes, Config::kTileN / kChunkN>(p, shared.full[0], first_column, at.head);
  }
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const i64 first = at.row_tile * kWarpgroupM, step = at.row_step * kWarpgroupM;
  if (first >= p.s) return;
  if (is_producer) {
    load_weights<Config::kOutBytes, Config::kTileN / kChunkN>(p, shared.w_uk[0][0], shared.full[0], first_column,
                                                              at.head);
  }
  __syncwarp();

  const int part = threadIdx.x % kParts;
  const int load_row = threadIdx.x / kParts;
  const u16* from = p.q_nope + at.head * p.q_nope_stride[1];
  i64 fetched = first;
  int fetched_stage = 0;
  const auto fetch = [&] {
    if (fetched < p.s) {
#pragma unroll
      for (int i = 0; i < Config::kSlots; ++i) {
        const i64 row = fetched + load_row + i * Config::kSlotRows;
        shared_rows::copy(shared.stage[fetched_stage][i], from + (row < p.s ? row : 0) * p.q_nope_stride[0], part,
                          row < p.s);
      }
    }
    ptx::cp_async_commit_group();
    fetched += step;
    fetched_stage = fetched_stage + 1 == Config::kRowStages ? 0 : fetched_stage + 1;
  };
  u32 pe[Config::kSlots][4];
  const auto fetch_pe = [&](i64 first_row) {
    if (p.pe == 0) return;
#pragma unroll
    for (int i = 0; i < Config::kSlots; ++i) {
      const PeChunk chunk = pe_chunk(p, first_row, pe_index<Config::kThreads>(at.slice, slices, i));
      if (chunk.exists) load_vector<kVectorBytes>(pe[i], pe_source(p, chunk, at.head));
    }
  };
#pragma unroll
  for (int i = 0; i < Config::kRowStages; ++i) fetch();
  fetch_pe(first);
  const LanePlace lane = lane_place();
  const float* w_scale_from = p.w_uk_scale + at.head * p.w_uk_scale_stride[0] +
                              (at.slice * Config::kWarpgroups + warpgroup) * Config::kChunks * p.w_uk_scale_stride[1];
  float w_scale[Config::kChunks];
#pragma unroll
  for (int chunk = 0; chunk < Config::kChunks; ++chunk) w_scale[chunk] = w_scale_from[chunk * p.w_uk_scale_stride[1]];
  const float multiplier = Config::kOutBytes == 1 ? __frcp_rn(*p.out_scale) : 1.0f;
  int buffer = 0, stage = 0;
  for (i64 first_row = first; first_row < p.s; first_row += step, buffer ^= 1) {
    ptx::cp_async_wait_group<Config::kRowStages - 1>();
    shared_rows::Raw raw[Config::kSlots];
#pragma unroll
    for (int i = 0; i < Config::kSlots; ++i) shared_rows::take(raw[i], shared.stage[stage][i]);
    fetch();
    stage = stage + 1 == Config::kRowStages ? 0 : stage + 1;
    shared_rows::quantize<Config::kSlotRows>(shared.rows[buffer], shared.scale[buffer], raw, p.is_fp16 != 0, load_row,
                                             part);
    ptx::fence_proxy_async_shared_cta();
    __syncthreads();
#pragma unroll
    for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
      wait(&shared.full[warpgroup][chunk], 0);
      multiply_and_store<Config>(p, shared.rows[buffer], shared.scale[buffer], shared.w_uk[warpgroup][chunk],
                                 w_scale[chunk], first_row, at.head,
                                 first_column + (warpgroup * Config::kChunks + chunk) * kChunkN, multiplier, lane);
    }
    if (p.pe != 0) {
      store_rows_pe<Config>(p, at, slices, pe, first_row, multiplier);
      if (first_row + step < p.s) fetch_pe(first_row + step);
    }
  }
}

}  // namespace mla_fp8::absorb_q
