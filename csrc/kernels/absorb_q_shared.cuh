// absorb_q (formula, tensors, cost, numerics: absorb_q.cuh) for D = 128 where few CTAs have rows, so that the time of one tile decides: its rows are
// quantized once, by all threads, and no warpgroup has more than 128 columns to make.
//
// Grid      a CTA holds 128 kWarpgroups columns of one head's W_UK and takes a run of neighbouring row tiles, 64 rows at a time.
// Warps     all threads load and quantize the rows (shared_rows.cuh); then warpgroup w multiplies, scales and stores columns 128 w... The next
//           rows are loaded while these are multiplied. Registers: 64 accumulators; 8 of raw rows and 4 of q_pe,
//           twice that where there are two warpgroups.
// Pipeline  barrier    producer -> consumer                      arrivals      bytes
//           full[w]    copy engine -> warpgroup w                1             16384, once a launch
//           CTA        rows and scales written -> all read       all threads   -; two buffers in turn, so one barrier a tile
// Shared memory  w_uk 16384 bytes a warpgroup, rows 2 x 8192 (e4m3), both 128-byte swizzle; scale 512; full 8 a warpgroup.
#pragma once

#include "kernels/absorb_q.cuh"
#include "kernels/shared_rows.cuh"

namespace mla_fp8::absorb_q {

static_assert(shared_rows::kRows == kWarpgroupM && shared_rows::kTileBytes == kWarpgroupM * kTileK);

template <int kWarpgroups_, int kOutBytes_>
struct SharedConfig {
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kTileN = kWarpgroups * kChunkN;
  static constexpr int kOutBytes = kOutBytes_;
  static constexpr int kSlots = kWarpgroupM * shared_rows::kParts / kThreads;  // rows, and chunks of q_pe, of a thread
  static constexpr int kSlotRows = kThreads / shared_rows::kParts;  // between a thread's rows
  using Shared = SharedRowsStorage<kWarpgroups>;
};

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

template <class Config>
MLA_FP8_DEVICE void run_shared(const Params& p, typename Config::Shared& shared) {
  const i32 slices = p.r / Config::kTileN;
  const shared_rows::Run at = shared_rows::run_of(p.h, slices, p.s);
  const bool is_producer = threadIdx.x == Config::kThreads - 32;
  const int warpgroup = threadIdx.x / kWarpgroup;
  const i32 first_column = at.slice * Config::kTileN;
  if (is_producer) {
    ptx::prefetch_tensormap(&p.w_uk);
#pragma unroll
    for (int chunk = 0; chunk < Config::kWarpgroups; ++chunk) {
      prefetch_weight_tile<kLaneColumns<Config::kOutBytes>>(&p.w_uk, 0, first_column + chunk * kChunkN, at.head);
      ptx::mbarrier_init(&shared.full[chunk], 1);
    }
    ptx::fence_mbarrier_init_release_cluster();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (at.first >= p.s) return;
  if (is_producer) {
#pragma unroll
    for (int chunk = 0; chunk < Config::kWarpgroups; ++chunk) {
      load_weight_tile<kLaneColumns<Config::kOutBytes>>(shared.w_uk[chunk], &p.w_uk, 0, first_column + chunk * kChunkN,
                                                        at.head, &shared.full[chunk]);
    }
  }
  __syncwarp();

  const int part = threadIdx.x % shared_rows::kParts;
  const int load_row = threadIdx.x / shared_rows::kParts;
  const u16* from = p.q_nope + at.head * p.q_nope_stride[1];
  shared_rows::Raw raw[Config::kSlots];
  u32 rope[Config::kSlots][4];
  const auto fetch = [&](i64 first_row) {
#pragma unroll
    for (int i = 0; i < Config::kSlots; ++i) {
      const i64 row = first_row + load_row + i * Config::kSlotRows;
      shared_rows::load(raw[i], from + row * p.q_nope_stride[0], part, row < p.s);
    }
    if (p.p != 0) {
#pragma unroll
      for (int i = 0; i < Config::kSlots; ++i) {
        const RopeChunk chunk = rope_chunk(p, first_row, rope_index<Config::kThreads>(at.slice, slices, i));
        if (chunk.exists) load_vector<kVectorBytes>(rope[i], rope_source(p, chunk, at.head));
      }
    }
  };
  fetch(at.first);
  const LanePlace lane = lane_place();
  const float w_scale = p.w_uk_scale[at.head * p.w_uk_scale_stride[0] +
                                     (at.slice * Config::kWarpgroups + warpgroup) * p.w_uk_scale_stride[1]];
  const float multiplier = Config::kOutBytes == 1 ? __frcp_rn(*p.out_scale) : 1.0f;
  int buffer = 0;
  for (i64 first_row = at.first; first_row < at.end; first_row += kWarpgroupM, buffer ^= 1) {
#pragma unroll
    for (int i = 0; i < Config::kSlots; ++i) {
      shared_rows::quantize(shared.rows[buffer], shared.scale[buffer], raw[i], p.is_fp16 != 0,
                            load_row + i * Config::kSlotRows, part);
    }
    if (p.p != 0) {
#pragma unroll
      for (int i = 0; i < Config::kSlots; ++i) {
        RopeChunk chunk = rope_chunk(p, first_row, rope_index<Config::kThreads>(at.slice, slices, i));
#pragma unroll
        for (int j = 0; j < 4; ++j) chunk.word[j] = rope[i][j];
        store_rope<Config::kOutBytes, kVectorBytes>(p, chunk, at.head, multiplier);
      }
      copy_rope<Config::kOutBytes, kVectorBytes, Config::kThreads>(p, first_row, at.head, at.slice, slices,
                                                                   Config::kSlots, multiplier);
    }
    ptx::fence_proxy_async_shared_cta();
    __syncthreads();
    wait(&shared.full[warpgroup], 0);
    float values[64];
    start_multiply(values, shared.rows[buffer], shared.w_uk[warpgroup]);
    if (first_row + kWarpgroupM < at.end) fetch(first_row + kWarpgroupM);
    float scale[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      scale[i] = __fmul_rn(shared.scale[buffer][lane.row + i * kLaneRowStep], w_scale);
    }
    ptx::wgmma_wait_group_sync_aligned<0>();
#pragma unroll
    for (int i = 0; i < 64; ++i) values[i] = __fmaf_rn(values[i], scale[i / 2 % 2], 0.0f);
    const RowValues rows[kLaneRows] = {row_values(values, 0), row_values(values, 1)};
    store_columns<Config::kOutBytes, kVectorBytes>(p, rows, first_row + lane.row, at.head,
                                                   first_column + warpgroup * kChunkN, multiplier, lane.quad);
  }
}

}  // namespace mla_fp8::absorb_q
