// absorb_q for any D, and any alignment: the sum of kloop.cuh (formula, pipeline, shared memory, numerics) with absorb_q's tensors and store.
//
// Cost: bytes as in absorb_q.cuh, but the weights of D > 512 cross from L2 for every row tile. DeepSeek's D = 128 goes by absorb_q.cuh.
#pragma once

#include "kernels/absorb_q.cuh"
#include "kernels/kloop.cuh"

namespace mla_fp8::absorb_q {

template <class Config>
MLA_FP8_DEVICE void run_kloop(const Params& p, typename Config::Shared& shared) {
  const i32 slices = p.r / kloop::kTileN;
  const Place at = place_of(p.h, slices);
  const kloop::Weights weights{&p.w_uk,
                               p.w_uk_scale + at.head * p.w_uk_scale_stride[0] + at.slice * p.w_uk_scale_stride[1],
                               p.w_uk_scale_stride[2],
                               at.head,
                               at.slice * kloop::kTileN,
                               p.d / kloop::kTileK};
  const LanePlace lane = lane_place();
  const kloop::QuantizingSource<Config::kAlignBytes> source{p.q_nope + at.head * p.q_nope_stride[1], p.q_nope_stride[0],
                                                            p.s, p.is_fp16 != 0, lane.quad};
  kloop::run<Config>(weights, at, p.s, shared, source, [&](i64 row, const float (&sums)[64]) {
    const float multiplier = Config::kOutBytes == 1 ? __frcp_rn(*p.out_scale) : 1.0f;
    if (p.pe != 0) {
      const i64 first_row = row - lane.row;
      copy_pe<Config::kOutBytes, Config::kAlignBytes, kWarpgroup>(p, first_row, at.head, at.slice, slices, 0,
                                                                  multiplier);
    }
    RowValues rows[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) rows[i] = row_values(sums, i);
    store_columns<Config::kOutBytes, Config::kAlignBytes>(p, rows, row, at.head, weights.first_column, multiplier,
                                                          lane.quad);
  });
}

}  // namespace mla_fp8::absorb_q
