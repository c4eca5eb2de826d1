// The orders of weight rows in shared memory. The kernels name their boxes by them, and
// static_asserts hold them against what each schedule's lanes expect.
#pragma once

#include "kernels/schedule.h"

namespace mla_fp8::sm90 {

inline constexpr int kQuad = 4;  // lanes that hold a row of wgmma's D
inline constexpr int kWarpRows = 8;  // rows of D that a warp's quads hold at once
inline constexpr int kWarpgroupWarps = 4;
inline constexpr int kWgmmaM = 64;  // rows of wgmma's A

// For schedules whose weights are wgmma's B: a lane's accumulators are kColumns neighbouring output
// columns.
MLA_FP8_HOST_DEVICE constexpr WeightOrder lane_order(int columns) {
  return {{2, kQuad}, {1, columns, 2}, {2, kQuad, columns / 2}};
}

// For schedules that swap AB, where weights are wgmma's A: a box is one tile of 64 rows, and a
// warpgroup has kTiles of them.
MLA_FP8_HOST_DEVICE constexpr WeightOrder swap_ab_order(int tiles) {
  return {{kWarpRows, 2 * tiles}, {2 * tiles, 1, 2 * tiles * kWarpRows}, {kWarpRows, 2, kWarpgroupWarps}};
}

// wgmma's D gives lane t of a quad the columns 8 j + 2 t + {0, 1}. They are to be the output's
// columns L t + 2 j + {0, 1} of every 4 L.
MLA_FP8_HOST_DEVICE constexpr bool gives_lanes_neighbours(int columns) {
  const WeightOrder order = lane_order(columns);
  for (int i = 0; i < order.box_rows(); ++i) {
    const int j = i / 8, lane = i % 8 / 2, e = i % 2;
    if (order.row(i) != columns * lane + 2 * j + e) return false;
  }
  return order.box_rows() == kQuad * columns;
}
static_assert(gives_lanes_neighbours(8) && gives_lanes_neighbours(16));

// wgmma's D gives lane 4 g + t of warp w the rows 16 w + g + {0, 8} of each tile. Tile i's are to
// be the output's columns L (8 w + g) + 2 i + {0, 1} of the warpgroup's, L = 2 tiles. Box i begins
// at y = 2 i.
MLA_FP8_HOST_DEVICE constexpr bool gives_swapped_lanes_neighbours(int tiles) {
  const WeightOrder order = swap_ab_order(tiles);
  for (int i = 0; i < kWgmmaM * tiles; ++i) {
    const int tile = i / kWgmmaM, warp = i % kWgmmaM / 16, e = i % 16 / 8, g = i % 8;
    if (order.row(i % kWgmmaM) + 2 * tile * order.stride[1] != 2 * tiles * (8 * warp + g) + 2 * tile + e) return false;
  }
  return order.box_rows() == kWgmmaM;
}
static_assert(gives_swapped_lanes_neighbours(1) && gives_swapped_lanes_neighbours(2) &&
              gives_swapped_lanes_neighbours(4));

}  // namespace mla_fp8::sm90
