// A 128x128 tile of weights in shared memory: how the copy engine brings it and wgmma reads it.
//
// The row that wgmma makes its column n of is chosen so that a lane's output columns are neighbours: row 8 j + 2 t + e of a box of 4 L rows
// is row L t + 2 j + e of the weights' (L: kLaneColumns). The tensor map sees the rows as e + 2 (jj + 2 L i) + L t, dims [K, e, t, jj, head].
#pragma once

#include "kernels/fragment.cuh"
#include "kernels/ptx/bulk_tensor.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/wgmma.cuh"
#include "kernels/types.h"

namespace mla_fp8 {

inline constexpr int kWeightTileBytes = kGroup * kGroup;

// What wgmma wants to know of a K-major tile of 128-byte rows under the 128-byte swizzle.
MLA_FP8_DEVICE u64 weight_descriptor(const u8* tile) {
  constexpr u64 kEightRowsBytes = 8 * kGroup;  // from one 8-row core matrix to the next
  constexpr u64 kSwizzle128B = u64{1} << 62;
  return static_cast<u64>((ptx::shared_address(tile) & 0x3ffffu) >> 4) | u64{1} << 16 | (kEightRowsBytes >> 4) << 32 |
         kSwizzle128B;
}

// p [64,128] = the fragment times the tile's transpose, complete on return.
MLA_FP8_DEVICE void multiply(float (&p)[64], Fragment& fragment, const u8* tile) {
  const u64 descriptor = weight_descriptor(tile);
#pragma unroll
  for (auto& step : fragment.a) {
#pragma unroll
    for (u32& word : step) ptx::settle(word);
  }
  ptx::wgmma_fence_sync_aligned();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    ptx::wgmma_m64n128k32_f32_e4m3_e4m3(p, fragment.a[step], descriptor + static_cast<u64>(step * kWgmmaK >> 4),
                                        step != 0);
  }
  ptx::wgmma_commit_group_sync_aligned();
  ptx::wgmma_wait_group_sync_aligned<0>();
}

MLA_FP8_DEVICE void wait(u64* barrier, u32 parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

template <int kColumns>
MLA_FP8_DEVICE ptx::BoxOrigin weight_box(int box, i32 column, i32 row, i32 z) {
  return {column, 0, 0, row / 2 + box * (kQuad * kColumns / 2), z};
}

// One thread. Tile (row / 128, column / 128) of head `z`, for outputs stored kColumns at a time.
template <int kColumns>
MLA_FP8_DEVICE void load_weight_tile(u8* to, const TensorMap* map, i32 column, i32 row, i32 z, u64* full) {
  constexpr int kBoxRows = kQuad * kColumns;
  ptx::mbarrier_arrive_expect_tx(full, kWeightTileBytes);
#pragma unroll
  for (int box = 0; box < kGroup / kBoxRows; ++box) {
    ptx::cp_async_bulk_tensor_5d(to + box * kBoxRows * kGroup, map, weight_box<kColumns>(box, column, row, z), full);
  }
}

// The same to L2, before griddepcontrol_wait.
template <int kColumns>
MLA_FP8_DEVICE void prefetch_weight_tile(const TensorMap* map, i32 column, i32 row, i32 z) {
#pragma unroll
  for (int box = 0; box < kGroup / (kQuad * kColumns); ++box) {
    ptx::cp_async_bulk_prefetch_tensor_5d(map, weight_box<kColumns>(box, column, row, z));
  }
}

// The tiles of this CTA: one column tile of one head, and every row_step-th row tile from row_tile (see config/tiles.h).
struct Place {
  i32 head, slice;
  i64 row_tile, row_step;
};

MLA_FP8_DEVICE Place place_of(u32 heads, u32 slices) {
  const u32 columns = heads * slices;
  const u32 column = blockIdx.x % columns;
  return {static_cast<i32>(column / slices), static_cast<i32>(column % slices), blockIdx.x / columns,
          gridDim.x / columns};
}

}  // namespace mla_fp8
