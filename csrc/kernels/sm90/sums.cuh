// A warpgroup's sums of 64 rows by 128 columns, as wgmma's D holds them, on their way out.
#pragma once

#include "kernels/sm90/lanes.cuh"
#include "kernels/sm90/store.cuh"

namespace mla_fp8::sm90 {

// The multiplier of a row of 128 values, which a quad of lanes holds. Its scale goes to
// out_row_scale, unless the row is `end` or later.
MLA_FP8_DEVICE float store_row_scale(const Product& p, const float (&value)[kChunkN / kQuad], u32 row, u32 end,
                                     i32 head, int quad) {
  const float scale = group_scale(amax_of_lanes<1, kQuad>(value));
  if (row < end && quad == 0)
    p.out_row_scale[row * p.out_row_scale_stride[0] + head * p.out_row_scale_stride[1]] = scale;
  return group_multiplier(scale);
}

// value_of(i) is the lane's value of accumulator i. They go to out from `column` on. `row` is the
// lane's first; the other one is row + 8. Rows from `end` on are not stored.
template <class C, class Element, class Value>
MLA_FP8_DEVICE void store_sums(Element element, const Product& p, i32 head, i32 column, u32 row, u32 end,
                               const Value& value_of, float out_multiplier) {
  const int quad = lane_place().quad;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const u32 at = row + i * kLaneRowStep;
    float value[kChunkN / kQuad];
#pragma unroll
    for (int c = 0; c < kChunkN / kQuad; ++c) value[c] = value_of(accumulator_of(c, i));
    float multiplier = out_multiplier;
    if (element.kBytes == 1 && C::Store::kRowScale && p.out_row_scale != nullptr)
      multiplier = store_row_scale(p, value, at, end, head, quad);
    store_row<C::kAlignBytes == kVectorBytes, C::kLaneColumns>(
        element, p.out, at * p.out_stride[0] + head * p.out_stride[1] + column, value, multiplier, at < end, quad);
  }
}

}  // namespace mla_fp8::sm90
