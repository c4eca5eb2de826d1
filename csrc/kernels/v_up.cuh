// 1. v[s,h,:] = sum over k of  scale_a[k] * scale_w[k] * (e4m3(o_latent[s,h,128 k..] / scale_a[k]) . W_UV[h,:,128 k..]),  rounded once;
//    v_up_quantized: that sum as e4m3 with one scale for its V = 128 columns
//
// 2. Tensors   o_latent  [S,H,R]            bf16 or fp16, any s and h stride
//              w_uv      [H,V,R]            e4m3, by tensor map: strides and address multiples of 16 (a view of kv_b_proj)
//              w_scale   [H,V/128,R/128]    fp32, any strides
//              v         [S,H,V]            o_latent's dtype, or e4m3 of the value / out_scale, or e4m3 of the value / v_scale
//              v_scale   [S,H]              fp32, any strides (made (1, ceil4(S)))
//              Pointers and strides of o_latent and v are aligned to the tile's alignment: 16 bytes, or an element.
//
// 3. Grid, 4. Warps, 5. Pipeline, 6. Shared memory: kloop.cuh. DeepSeek's R = 512 is one batch of four blocks whose weights stay.
//              v_up_few.cuh and v_up_shared.cuh are faster at R = 512 and few or some rows.
//
// 7. Cost      bytes = 2 S H R + H V R (1 + 4 / 16384) + S H V out_bytes (+ 4 S H); 2 S H V R FLOP. Bound by memory at every S.
//
// 8. Numerics  the 1x128 quantization of docs/numerics.md, and kloop.cuh's sums; one rounding to v's dtype. V = 128 is one scale group:
//              amax over the row's quad of lanes, NaN propagating. Zero rows give zeros (v_scale is the floor's); a NaN or Inf makes its
//              own row NaN and no other.
#pragma once

#include "kernels/kloop.cuh"
#include "kernels/v_up.h"

namespace mla_fp8::v_up {

// Of one row's 128 values, which a quad of lanes holds.
MLA_FP8_DEVICE float row_amax(const RowValues& values) {
  float amax = 0;
#pragma unroll
  for (float value : values.value) amax = ptx::max_nan_f32(amax, fabsf(value));
#pragma unroll
  for (int lanes = 1; lanes < kQuad; lanes *= 2) amax = ptx::max_nan_f32(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
  return amax;
}

template <class Config>
MLA_FP8_DEVICE void run(const Params& p, typename Config::Shared& shared) {
  const Place at = place_of(p.h, p.v_dim / kloop::kTileN);
  const kloop::Weights weights{&p.w_uv,
                               p.w_uv_scale + at.head * p.w_uv_scale_stride[0] + at.slice * p.w_uv_scale_stride[1],
                               p.w_uv_scale_stride[2],
                               at.head,
                               at.slice * kloop::kTileN,
                               p.r / kloop::kTileK};
  const LanePlace lane = lane_place();
  const kloop::QuantizingSource<Config::kAlignBytes> source{p.o_latent + at.head * p.o_latent_stride[1],
                                                            p.o_latent_stride[0], p.s, p.is_fp16 != 0, lane.quad};
  kloop::run<Config>(weights, at, p.s, shared, source, [&](i64 row, const float (&sums)[64]) {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const i64 lane_row = row + i * kLaneRowStep;
      const bool exists = lane_row < p.s;
      const RowValues values = row_values(sums, i);
      float multiplier = 1.0f;
      if constexpr (Config::kOutBytes == 1) {
        if (p.v_scale != nullptr) {
          const float scale = group_scale(row_amax(values));
          multiplier = group_multiplier(scale);
          if (exists && lane.quad == 0)
            p.v_scale[lane_row * p.v_scale_stride[0] + at.head * p.v_scale_stride[1]] = scale;
        } else {
          multiplier = __frcp_rn(*p.out_scale);
        }
      }
      store_row<Config::kOutBytes, Config::kAlignBytes>(
          p.v, lane_row * p.v_stride[0] + at.head * p.v_stride[1] + weights.first_column, values, multiplier,
          p.is_fp16 != 0, exists, lane.quad);
    }
  });
}

}  // namespace mla_fp8::v_up
