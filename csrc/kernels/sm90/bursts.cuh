#pragma once

#include "kernels/grid.cuh"
#include "kernels/phases.cuh"

namespace mla_fp8::sm90 {

// With phases: how often a CTA reads and then writes, which is the same in every CTA, and how many
// row tiles each time.
struct Bursts {
  u32 count, tiles;
};

template <class C>
MLA_FP8_DEVICE Bursts bursts_of(u32 s, const Place& at, u32 most) {
  const u32 row_tiles = (s + C::kTileM - 1) / C::kTileM, step = static_cast<u32>(at.row_step);
  const u32 most_tiles = (row_tiles + step - 1) / step;  // of a CTA
  const u32 count = (most_tiles + most - 1) / most;
  return {count, (most_tiles + count - 1) / count};
}

}  // namespace mla_fp8::sm90
