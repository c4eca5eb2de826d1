// absorb_q (formula, tensors, cost, numerics: absorb_q.cuh) for D = 128 and many rows: all CTAs read and quantize up to kBurst row tiles, then all of
// them multiply and write (phases.cuh).
//
// Grid      a CTA holds 512 columns of one head's of W_UK and takes the row tiles of 64 rows, kBurst of them at a time (config/tiles.h).
// Warps     reading: a thread brings 32 bytes of q_nope and 16 of q_pe a tile to its own places in a ring, quantizes them to the tile's place. Writing:
//           warpgroup w multiplies, scales and stores columns 128 w.. of each tile in turn; no warp waits for another until the burst is done.
//           Registers: 64 accumulators.
// Pipeline  barrier        producer -> consumer                        arrivals      bytes
//           full[w]        copy engine -> warpgroup w                  1             16384, once a launch
//           cp.async batch a thread -> itself                          -             32 a thread, and 16 of q_pe; kStages batches under way
//           CTA            a burst's rows and scales written -> read   all threads   -
//           CTA, phase     a burst's rows read -> written again        all threads   -
// Shared memory  w_uk 64 KiB, rows 8192 a tile (e4m3), both 128-byte swizzle; q_pe as it is stored, 4096 or 8192 a tile; scale 256 a tile; ring 48 KiB.
#pragma once

#include "kernels/absorb_q.cuh"
#include "kernels/phases.cuh"
#include "kernels/shared_rows.cuh"

namespace mla_fp8::absorb_q {

static_assert(shared_rows::kRows == kWarpgroupM && shared_rows::kTileBytes == kWarpgroupM * kTileK);
static_assert(shared_rows::kRows * kParts == kPhasedThreads);  // a thread has one row's share of a tile

// p [64,128] = the rows times the tile's transpose, under way on return.
MLA_FP8_DEVICE void start_multiply(float (&p)[64], const u8* rows, const u8* tile) {
  const u64 a = weight_descriptor(rows);
  const u64 b = weight_descriptor(tile);
  ptx::wgmma_fence_sync_aligned();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    ptx::wgmma_m64n128k32_f32_e4m3_e4m3_shared(p, a + step * shared_rows::kStepDescriptor,
                                               b + step * shared_rows::kStepDescriptor, step != 0);
  }
  ptx::wgmma_commit_group_sync_aligned();
}

// A thread's chunk of q_pe, as it will be stored, to where the burst keeps it.
template <int kOutBytes>
MLA_FP8_DEVICE void keep_pe(u8* kept, const PeChunk& pe, bool is_fp16, float multiplier) {
  if constexpr (kOutBytes == 1) {
    *reinterpret_cast<uint2*>(kept) = is_fp16 ? pe_e4m3<Fp16>(pe, multiplier) : pe_e4m3<Bf16>(pe, multiplier);
  } else {
    *reinterpret_cast<uint4*>(kept) = make_uint4(pe.word[0], pe.word[1], pe.word[2], pe.word[3]);
  }
}

// A thread's chunk of q_pe from where the burst keeps it.
template <int kOutBytes>
MLA_FP8_DEVICE void store_kept_pe(const Params& p, const u8* kept, i64 first_row, i64 head) {
  const PeChunk chunk = pe_chunk(p, first_row, threadIdx.x);
  if (!chunk.exists) return;
  u8* to = static_cast<u8*>(p.q) + (chunk.row * p.q_stride[0] + head * p.q_stride[1] + p.r + chunk.column) * kOutBytes;
  if constexpr (kOutBytes == 1) {
    ptx::st_global_cs_v2(to, *reinterpret_cast<const uint2*>(kept));
  } else {
    ptx::st_global_cs_v4(to, *reinterpret_cast<const uint4*>(kept));
  }
}

// A thread's share of a row tile, in its open batch of copies.
MLA_FP8_DEVICE void fetch_tile(const Params& p, PhasedStage& stage, const u16* from, i64 first_row, int load_row,
                               int part, i32 head, bool has_pe) {
  const i64 row = first_row + load_row;
  shared_rows::copy(stage.q_nope, from + (row < p.s ? row : 0) * p.q_nope_stride[0], part, row < p.s);
  if (has_pe) {
    const PeChunk chunk = pe_chunk(p, first_row, threadIdx.x);
    if (chunk.exists) ptx::cp_async_cg_16(stage.q_pe[threadIdx.x], pe_source(p, chunk, head), kVectorBytes);
  }
}

template <class Config>
MLA_FP8_DEVICE void run_phased(const Params& p, typename Config::Shared& shared) {
  using Shared = typename Config::Shared;
  constexpr int kOutBytes = Config::kOutBytes;
  const Place at = place_of(p.h, p.r / kPhasedN);
  const i32 first_column = at.slice * kPhasedN;
  const bool has_pe = p.pe != 0 && at.slice == 0;
  const bool is_producer = threadIdx.x == kPhasedThreads - 32;
  const int warpgroup = threadIdx.x / kWarpgroup;
  if (is_producer) prefetch_weights<kOutBytes, kPhasedWarpgroups>(p, shared.full, first_column, at.head);
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (is_producer) load_weights<kOutBytes, kPhasedWarpgroups>(p, shared.w_uk[0], shared.full, first_column, at.head);
  __syncwarp();

  const int part = threadIdx.x % kParts;
  const int load_row = threadIdx.x / kParts;
  const u16* from = p.q_nope + at.head * p.q_nope_stride[1];
  const int most = p.pe == 0 ? Shared::kBurst : Shared::kBurstWithPe;
  const i64 step = at.row_step * kWarpgroupM;
  const i64 most_tiles = ((p.s + kWarpgroupM - 1) / kWarpgroupM + at.row_step - 1) / at.row_step;  // of a CTA
  const i64 bursts = (most_tiles + most - 1) / most;  // the same in every CTA
  const int burst = static_cast<int>((most_tiles + bursts - 1) / bursts);
  u8* const rows = shared.tiles;  // of a tile after the other
  float* const scales = reinterpret_cast<float*>(rows + most * Shared::kRowsBytes);
  u8* const kept_pe =
      rows + most * (Shared::kRowsBytes + Shared::kScaleBytes) + threadIdx.x * Shared::kPeBytes;  // this thread's
  const auto pe_at = [&](int tile) { return kept_pe + tile * (kPhasedThreads * Shared::kPeBytes); };
  i64 fetched = at.row_tile * kWarpgroupM;
  i64 fetch_end = 0;  // rows from here on are the next burst's
  int fetched_stage = 0;
  const auto fetch = [&] {
    if (fetched < p.s && fetched < fetch_end) {
      fetch_tile(p, shared.stage[fetched_stage], from, fetched, load_row, part, at.head, has_pe);
    }
    ptx::cp_async_commit_group();
    fetched += step;
    fetched_stage = fetched_stage + 1 == kPhasedStages ? 0 : fetched_stage + 1;
  };
  const LanePlace lane = lane_place();
  const float w_scale = p.w_uk_scale[at.head * p.w_uk_scale_stride[0] +
                                     (at.slice * kPhasedWarpgroups + warpgroup) * p.w_uk_scale_stride[1]];
  const float multiplier = kOutBytes == 1 ? __frcp_rn(*p.out_scale) : 1.0f;
  phases::Barrier phase(p.phase_slot);
  int stage = 0;
  i64 first_row = at.row_tile * kWarpgroupM;
  for (i64 done = 0; done < bursts; ++done, first_row += burst * step) {
    fetched = first_row;
    fetch_end = first_row + burst * step;
#pragma unroll
    for (int i = 0; i < kPhasedStages; ++i) fetch();
    const int tiles =
        first_row >= p.s ? 0 : static_cast<int>(min(static_cast<i64>(burst), (p.s - first_row + step - 1) / step));
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      ptx::cp_async_wait_group<kPhasedStages - 1>();
      shared_rows::Raw raw[1];
      shared_rows::take(raw[0], shared.stage[stage].q_nope);
      PeChunk pe;
      if (has_pe) load_shared(pe.word, shared.stage[stage].q_pe[threadIdx.x]);
      fetch();
      stage = stage + 1 == kPhasedStages ? 0 : stage + 1;
      shared_rows::quantize<0>(rows + tile * Shared::kRowsBytes, scales + tile * kWarpgroupM, raw, p.is_fp16 != 0,
                               load_row, part);
      if (has_pe) keep_pe<kOutBytes>(pe_at(tile), pe, p.is_fp16 != 0, multiplier);
    }
    ptx::fence_proxy_async_shared_cta();
    __syncthreads();
    wait(&shared.full[warpgroup], 0);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const i64 tile_row = first_row + tile * step;
      float values[64];
      start_multiply(values, rows + tile * Shared::kRowsBytes, shared.w_uk[warpgroup]);
      float scale[kLaneRows];
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i)
        scale[i] = __fmul_rn(scales[tile * kWarpgroupM + lane.row + i * kLaneRowStep], w_scale);
      if (has_pe) {
        store_kept_pe<kOutBytes>(p, pe_at(tile), tile_row, at.head);
        copy_pe<kOutBytes, kVectorBytes, kPhasedThreads>(p, tile_row, at.head, 0, 1, 1, multiplier);
      }
      ptx::wgmma_wait_group_sync_aligned<0>();
      store_products<kOutBytes, kVectorBytes>(p, values, scale, tile_row + lane.row, at.head,
                                              first_column + warpgroup * kChunkN, multiplier, lane.quad);
    }
    if (done + 1 < bursts) {
      __syncthreads();
      if (threadIdx.x == 0) phase.arrive_and_wait();
      __syncthreads();
    }
  }
  wait(&shared.full[warpgroup], 0);  // every copy has landed before the CTA ends, also in one without rows
}

}  // namespace mla_fp8::absorb_q
