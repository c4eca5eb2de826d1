// v_up and v_up_quantized (formula, tensors, cost, numerics: v_up.cuh) for R = 512 and few rows, where the time to the first byte and the
// arithmetic after the last one decide: a warpgroup for each of the four blocks of R, so that no thread works on two of them.
//
// Grid      a CTA makes 64 rows x 128 columns of one head; W_UV[h] stays while row tiles pass.
// Warps     warpgroup k: quantizes columns 128 k.. of the rows, multiplies, publishes p_k; then it adds the four p of columns 32 k.., k ascending
//           and by the same fused multiply-adds as kloop.cuh, and stores them.
// Pipeline  barrier    producer -> consumer                      arrivals  bytes
//           full[k]    copy engine -> warpgroup k                1         16384, once a launch
//           CTA        p, scales (and amax) written -> all read  512       -
// Shared memory  w_uv 64 KiB, product 128 KiB, scale and amax 1 KiB each.
#pragma once

#include "kernels/v_up.cuh"

namespace mla_fp8::v_up {

inline constexpr int kQuarterWords = kQuarter / 8;  // groups of 8 columns, of which a lane has 2 a row
static_assert(sizeof(SplitStorage) <= 227 * 1024);
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

template <int kOutBytes>
MLA_FP8_DEVICE void run_split(const Params& p, SplitStorage& shared) {
  const i32 slices = p.v_dim / kloop::kTileN;
  const Walk at = walk(p.h, slices);
  const int warpgroup = threadIdx.x / kloop::kWarpgroup;
  const int thread = threadIdx.x % kloop::kWarpgroup;
  const i32 first_column = at.slice * kloop::kTileN;
  const bool is_producer = thread == kloop::kWarpgroup - 32;  // of its block, in the warp with the fewest rows

  if (is_producer) {
    ptx::prefetch_tensormap(&p.w_uv);
    prefetch_weight_tile<kQuarterColumns>(&p.w_uv, warpgroup * kloop::kTileK, first_column, at.head);
    ptx::mbarrier_init(&shared.full[warpgroup], 1);
    ptx::fence_mbarrier_init_release_cluster();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (at.row_tile * kloop::kWarpgroupM >= p.s) return;
  if (is_producer) {
    load_weight_tile<kQuarterColumns>(shared.w_uv[warpgroup], &p.w_uv, warpgroup * kloop::kTileK, first_column, at.head,
                                      &shared.full[warpgroup]);
  }
  __syncwarp();

  const LanePlace lane = lane_place();
  const float out_scale = kOutBytes == 1 && p.out_scale != nullptr ? *p.out_scale : 1.0f;
  const float w_scale = p.w_uv_scale[at.head * p.w_uv_scale_stride[0] + at.slice * p.w_uv_scale_stride[1] +
                                     warpgroup * p.w_uv_scale_stride[2]];
  for (i64 first_row = at.row_tile * kloop::kWarpgroupM; first_row < p.s;
       first_row += at.row_step * kloop::kWarpgroupM) {
    const bool warp_has_rows = first_row + (lane.row & ~15) < p.s;
    RawRow raw[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const i64 row = first_row + lane.row + i * kLaneRowStep;
      load_row<kVectorBytes>(
          raw[i], p.o_latent + row * p.o_latent_stride[0] + at.head * p.o_latent_stride[1] + warpgroup * kloop::kTileK,
          row < p.s, lane.quad);
    }
    Fragment fragment;
    quantize(raw, p.is_fp16 != 0, fragment);
    if (lane.quad == 0) {
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i)
        shared.scale[warpgroup][lane.row + i * kLaneRowStep] = __fmul_rn(fragment.scale[i], w_scale);
    }
    wait(&shared.full[warpgroup], 0);
    float product[64];
    multiply(product, fragment, shared.w_uv[warpgroup]);
    if (warp_has_rows) {
#pragma unroll
      for (int j = 0; j < kloop::kTileN / 8; ++j) {
        *reinterpret_cast<float4*>(shared.product[warpgroup][j][thread]) =
            make_float4(product[4 * j], product[4 * j + 1], product[4 * j + 2], product[4 * j + 3]);
      }
    }
    __syncthreads();

    QuarterRow rows[kLaneRows] = {};
    if (warp_has_rows) {
#pragma unroll
      for (int k = 0; k < kSplitBlocks; ++k) {
#pragma unroll
        for (int j = 0; j < kQuarterWords; ++j) {
          const float4 four =
              *reinterpret_cast<const float4*>(shared.product[k][warpgroup * kQuarterWords + j][thread]);
#pragma unroll
          for (int i = 0; i < kLaneRows; ++i) {
            const float scale = shared.scale[k][lane.row + i * kLaneRowStep];
            float* value = rows[i].value + 2 * j;
            value[0] = __fmaf_rn(i == 0 ? four.x : four.z, scale, value[0]);
            value[1] = __fmaf_rn(i == 0 ? four.y : four.w, scale, value[1]);
          }
        }
      }
    }
    float multiplier[kLaneRows] = {1.0f, 1.0f};
    if constexpr (kOutBytes == 1) {
      if (p.v_scale != nullptr) {
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
          float amax = 0;
#pragma unroll
          for (float value : rows[i].value) amax = ptx::max_nan_f32(amax, fabsf(value));
#pragma unroll
          for (int lanes = 1; lanes < kQuad; lanes *= 2)
            amax = ptx::max_nan_f32(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
          if (lane.quad == 0) shared.amax[warpgroup][lane.row + i * kLaneRowStep] = amax;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
          float amax = 0;
#pragma unroll
          for (const auto& quarter : shared.amax) amax = ptx::max_nan_f32(amax, quarter[lane.row + i * kLaneRowStep]);
          const float scale = group_scale(amax);
          multiplier[i] = __frcp_rn(scale);
          const i64 row = first_row + lane.row + i * kLaneRowStep;
          if (row < p.s && lane.quad == 0 && warpgroup == 0)
            p.v_scale[row * p.v_scale_stride[0] + at.head * p.v_scale_stride[1]] = scale;
        }
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
    if (first_row + at.row_step * kloop::kWarpgroupM < p.s)
      __syncthreads();  // the next tile writes what this one has read
  }
}

}  // namespace mla_fp8::v_up
