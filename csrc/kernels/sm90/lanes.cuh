// Where a warpgroup's lanes keep wgmma's D, 64 rows by some columns.
#pragma once

#include "kernels/sm90/schedules.h"

namespace mla_fp8::sm90 {

// A lane's first row of a tile of 64, while the other one is 8 below; and the lane's place in the
// quad that holds them.
struct LanePlace {
  int row, quad;
};
inline constexpr int kLaneRows = 2, kLaneRowStep = 8;

MLA_FP8_DEVICE LanePlace lane_place() {
  const int thread = threadIdx.x % kWarpgroup;
  return {thread / kWarp * 16 + thread % kWarp / kQuad, thread % kQuad};
}

// Value i of a lane's row, out of wgmma's D.
MLA_FP8_DEVICE constexpr int accumulator_of(int i, int row) { return i / 2 * 4 + row * 2 + i % 2; }

}  // namespace mla_fp8::sm90
