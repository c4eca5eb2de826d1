// v_up and v_up_quantized (formula, tensors, cost, numerics: v_up.cuh) for R = 512 and some rows: they are quantized once, by all threads, into
// shared memory, and the sums stay in registers.
//
// Grid      a CTA makes 128 columns of one head and takes a run of neighbouring row tiles, 64 rows at a time; W_UV[h] stays.
// Warps     all threads load and quantize the rows (shared_rows.cuh); then warpgroup w multiplies all of R with columns 32 w.., adds the four
//           products, k ascending and by the same fused multiply-adds as kloop.cuh, and stores them. The next rows are loaded meanwhile.
//           Registers: 64 of products, 16 sums, 32 of raw rows.
// Pipeline  barrier    producer -> consumer                      arrivals  bytes
//           full[k]    copy engine -> all                        1         16384, once a launch
//           CTA        rows and scales written -> all read       512       -; two buffers in turn, so one barrier a tile (one more for v_scale)
// Shared memory  w_uv 64 KiB, rows 2 x 32 KiB (e4m3), both 128-byte swizzle; scale and amax 2 KiB each.
#pragma once

#include "kernels/shared_rows.cuh"
#include "kernels/v_up.cuh"

namespace mla_fp8::v_up {

static_assert(shared_rows::kRows * kParts == kSharedThreads);  // a thread has one row of each block

inline constexpr int kQuarterWords = kQuarter / 8;  // groups of 8 columns, of which a lane has 2 a row
static_assert(kQuarterWords == kQuad);

// A lane's share of one row's 32 columns: 8 t...
struct QuarterRow {
  float value[kQuarterColumns];
};

template <int kOutBytes>
MLA_FP8_DEVICE void store_quarter(void* v, i64 offset, const QuarterRow& row, float multiplier, bool is_fp16,
                                  bool exists, int quad) {
  if (!exists) return;
  u8* to = static_cast<u8*>(v) + (offset + kQuarterColumns * quad) * kOutBytes;
  if constexpr (kOutBytes == 1) {
    ptx::st_global_cs_v2(to, make_uint2(pack_e4m3(row.value, multiplier), pack_e4m3(row.value + 4, multiplier)));
  } else {
    ptx::st_global_cs_v4(to, pack_16bit(row.value, is_fp16));
  }
}

// product[k] [64,32] = block k of the rows times block k of 32 columns, complete on return.
MLA_FP8_DEVICE void multiply_blocks(float (&product)[kBlocks][16], SharedRowsStorage& shared, int buffer,
                                    int first_column) {
  ptx::wgmma_fence_sync_aligned();
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) {
    wait(&shared.full[k], 0);
    const u64 a = weight_descriptor(shared.rows[buffer][k]);
    const u64 b = weight_descriptor(shared.w_uv[k] + first_column * kloop::kTileK);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      ptx::wgmma_m64n32k32_f32_e4m3_e4m3_shared(product[k], a + step * shared_rows::kStepDescriptor,
                                                b + step * shared_rows::kStepDescriptor, step != 0);
    }
  }
  ptx::wgmma_commit_group_sync_aligned();
  ptx::wgmma_wait_group_sync_aligned<0>();
}

// rows += the blocks' products, each scaled, k ascending.
MLA_FP8_DEVICE void add_blocks(QuarterRow (&rows)[kLaneRows], const float (&product)[kBlocks][16],
                               const float (&row_scale)[kBlocks][shared_rows::kRows], const float (&w_scale)[kBlocks],
                               const LanePlace& lane) {
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const float scale = __fmul_rn(row_scale[k][lane.row + i * kLaneRowStep], w_scale[k]);
#pragma unroll
      for (int j = 0; j < kQuarterWords; ++j) {
        float* value = rows[i].value + 2 * j;
        value[0] = __fmaf_rn(product[k][4 * j + 2 * i], scale, value[0]);
        value[1] = __fmaf_rn(product[k][4 * j + 2 * i + 1], scale, value[1]);
      }
    }
  }
}

// The scale of a row's 128 values, of which a lane has eight: to v_scale, and its reciprocal to the row's multiplier.
MLA_FP8_DEVICE void share_scales(const Params& p, SharedRowsStorage& shared, const QuarterRow (&rows)[kLaneRows],
                                 float (&multiplier)[kLaneRows], i64 first_row, int buffer, int warpgroup, i32 head,
                                 const LanePlace& lane) {
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    float amax = 0;
#pragma unroll
    for (float value : rows[i].value) amax = ptx::max_nan_f32(amax, fabsf(value));
#pragma unroll
    for (int lanes = 1; lanes < kQuad; lanes *= 2)
      amax = ptx::max_nan_f32(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
    if (lane.quad == 0) shared.amax[buffer][warpgroup][lane.row + i * kLaneRowStep] = amax;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    float amax = 0;
#pragma unroll
    for (const auto& quarter : shared.amax[buffer]) amax = ptx::max_nan_f32(amax, quarter[lane.row + i * kLaneRowStep]);
    const float scale = group_scale(amax);
    multiplier[i] = group_multiplier(scale);
    const i64 row = first_row + lane.row + i * kLaneRowStep;
    if (row < p.s && lane.quad == 0 && warpgroup == 0)
      p.v_scale[row * p.v_scale_stride[0] + head * p.v_scale_stride[1]] = scale;
  }
}

template <class Config>
MLA_FP8_DEVICE void run_shared(const Params& p, SharedRowsStorage& shared) {
  constexpr int kOutBytes = Config::kOutBytes;
  const i32 slices = p.v_dim / kloop::kTileN;
  const shared_rows::RowRun at = shared_rows::row_run_of(p.h, slices, p.s);
  const int warpgroup = threadIdx.x / kloop::kWarpgroup;
  const i32 first_column = at.slice * kloop::kTileN;
  const bool is_producer = threadIdx.x % kloop::kWarpgroup == kloop::kWarpgroup - 32;  // of its block
  if (is_producer) {
    ptx::prefetch_tensormap(&p.w_uv);
    prefetch_weight_tile<kQuarterColumns>(&p.w_uv, warpgroup * kloop::kTileK, first_column, at.head);
    ptx::mbarrier_init(&shared.full[warpgroup], 1);
    ptx::fence_mbarrier_init_release_cluster();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (at.first >= p.s) return;
  if (is_producer) {
    load_weight_tile<kQuarterColumns>(shared.w_uv[warpgroup], &p.w_uv, warpgroup * kloop::kTileK, first_column, at.head,
                                      &shared.full[warpgroup]);
  }
  __syncwarp();

  const int part = threadIdx.x % kParts;
  const int load_row = threadIdx.x / kParts;
  const u16* from = p.o_latent + at.head * p.o_latent_stride[1];
  shared_rows::Raw raw[kBlocks];
  const auto fetch = [&](i64 first_row) {
    const i64 row = first_row + load_row;
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
      shared_rows::load(raw[k], from + row * p.o_latent_stride[0] + k * kloop::kTileK, part, row < p.s);
    }
  };
  fetch(at.first);
  const LanePlace lane = lane_place();
  float w_scale[kBlocks];
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) {
    w_scale[k] =
        p.w_uv_scale[at.head * p.w_uv_scale_stride[0] + at.slice * p.w_uv_scale_stride[1] + k * p.w_uv_scale_stride[2]];
  }
  const float out_scale = kOutBytes == 1 && p.out_scale != nullptr ? *p.out_scale : 1.0f;
  int buffer = 0;
  for (i64 first_row = at.first; first_row < at.end; first_row += shared_rows::kRows, buffer ^= 1) {
    if (p.is_fp16 != 0) {
#pragma unroll
      for (int k = 0; k < kBlocks; ++k)
        shared_rows::quantize_row<Fp16>(shared.rows[buffer][k], shared.scale[buffer][k], raw[k], load_row, part);
    } else {
#pragma unroll
      for (int k = 0; k < kBlocks; ++k)
        shared_rows::quantize_row<Bf16>(shared.rows[buffer][k], shared.scale[buffer][k], raw[k], load_row, part);
    }
    ptx::fence_proxy_async_shared_cta();
    __syncthreads();
    if (first_row + shared_rows::kRows < at.end) fetch(first_row + shared_rows::kRows);
    float product[kBlocks][16];
    multiply_blocks(product, shared, buffer, warpgroup * kQuarter);
    QuarterRow rows[kLaneRows] = {};
    add_blocks(rows, product, shared.scale[buffer], w_scale, lane);
    float multiplier[kLaneRows] = {1.0f, 1.0f};
    if constexpr (kOutBytes == 1) {
      if (p.v_scale != nullptr) {
        share_scales(p, shared, rows, multiplier, first_row, buffer, warpgroup, at.head, lane);
      } else {
        multiplier[0] = multiplier[1] = __frcp_rn(out_scale);
      }
    }
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const i64 row = first_row + lane.row + i * kLaneRowStep;
      const i64 offset = row * p.v_stride[0] + at.head * p.v_stride[1] + first_column + warpgroup * kQuarter;
      store_quarter<kOutBytes>(p.v, offset, rows[i], multiplier[i], p.is_fp16 != 0, row < p.s, lane.quad);
    }
  }
}
}  // namespace mla_fp8::v_up
