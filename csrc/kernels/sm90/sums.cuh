// A warpgroup's sums of 64 rows by some columns, as wgmma's D holds them, on their way out.
#pragma once

#include "kernels/sm90/lanes.cuh"
#include "kernels/sm90/store.cuh"

namespace mla_fp8::sm90 {

// Rows of 128 values that no other warpgroup has a part of: nothing more to compare.
struct OwnAmax {
  MLA_FP8_DEVICE void operator()(float (&)[kLaneRows], const LanePlace&) const {}
};

// The multipliers of the lane's rows; their scales go to out_row_scale. Rows from `end` on do not
// exist. all_columns(amax, lane) makes the amax of this warpgroup's columns one of all 128.
template <int kValues, class AllColumns>
MLA_FP8_DEVICE void store_row_scales(float (&multiplier)[kLaneRows], const Product& p,
                                     const float (&value)[kLaneRows][kValues], u32 row, u32 end, i32 head,
                                     const LanePlace& lane, const AllColumns& all_columns) {
  float amax[kLaneRows];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) amax[i] = amax_of_lanes<1, kQuad>(value[i]);
  all_columns(amax, lane);
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const float scale = group_scale(amax[i]);
    multiplier[i] = group_multiplier(scale);
    const u32 at = row + i * kLaneRowStep;
    if (at < end && lane.quad == 0)
      p.out_row_scale[at * p.out_row_scale_stride[0] + head * p.out_row_scale_stride[1]] = scale;
  }
}

// value_of(i) is the lane's value of accumulator i of kColumns columns. They go to out from `column`
// on. `row` is the lane's first; the other one is row + 8.
template <class C, int kColumns, class Element, class Value, class AllColumns = OwnAmax>
MLA_FP8_DEVICE void store_sums(Element element, const Product& p, i32 head, i32 column, u32 row, u32 end,
                               const Value& value_of, float out_multiplier, const AllColumns& all_columns = {}) {
  const LanePlace lane = lane_place();
  float value[kLaneRows][kColumns / kQuad];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
    for (int c = 0; c < kColumns / kQuad; ++c) value[i][c] = value_of(accumulator_of(c, i));
  }
  float multiplier[kLaneRows] = {out_multiplier, out_multiplier};
  if (element.kBytes == 1 && C::Store::kRowScale && p.out_row_scale != nullptr)
    store_row_scales(multiplier, p, value, row, end, head, lane, all_columns);
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const u32 at = row + i * kLaneRowStep;
    store_row<C::kAlignBytes == kVectorBytes, C::kLaneColumns>(
        element, p.out, at * p.out_stride[0] + head * p.out_stride[1] + column, value[i], multiplier[i], at < end,
        lane.quad);
  }
}

}  // namespace mla_fp8::sm90
