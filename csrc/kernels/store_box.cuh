// A warp's 16 rows x 128 columns of output by the copy engine: 128-byte rows in shared memory, 128-byte swizzle, two boxes in turn.
#pragma once

#include "kernels/fragment.cuh"
#include "kernels/ptx/bulk_store.cuh"
#include "kernels/types.h"

namespace mla_fp8 {

inline constexpr int kBoxRows = 16;  // of a warp
inline constexpr int kBoxRowBytes = 128;  // the swizzle's width
inline constexpr int kBoxes = 2;  // one is filled while the other is read

// 16 bytes of a row: the swizzle exchanges chunks within each 8 rows.
MLA_FP8_DEVICE u8* box_chunk(u8 (&box)[kBoxRows][kBoxRowBytes], int row, int chunk) {
  return box[row] + ((chunk ^ row % 8) * kVectorBytes);
}

// Before a box is filled: the store that read it two boxes ago is done with it.
MLA_FP8_DEVICE void acquire_box() {
  if (threadIdx.x % 32 == 0) ptx::cp_async_bulk_wait_group_read<kBoxes - 1>();
  __syncwarp();
}

// After every lane has written its part.
MLA_FP8_DEVICE void send_box(const TensorMap* map, const u8 (&box)[kBoxRows][kBoxRowBytes], i32 column, i32 head,
                             i32 row) {
  ptx::fence_proxy_async_shared_cta();
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    ptx::cp_async_bulk_tensor_store_3d(map, box, column, head, row);
    ptx::cp_async_bulk_commit_group();
  }
}

// 128 columns of bf16 or fp16 are two boxes of 64.
MLA_FP8_DEVICE void store_boxes_16bit(u8 (&boxes)[kBoxes][kBoxRows][kBoxRowBytes], const TensorMap* map,
                                      const float (&values)[64], bool is_fp16, i32 column, i32 head, i32 row) {
  constexpr int kBoxColumns = kBoxRowBytes / 2;
  const int lane = threadIdx.x % 32;
  PackedRow packed[kLaneRows];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) pack_row(packed[i], row_values(values, i), is_fp16);
#pragma unroll
  for (int half = 0; half < kBoxes; ++half) {
    acquire_box();
#pragma unroll
    for (int j = 0; j < kBoxColumns / 8; j += 2) {  // two groups of 8 columns: 16 bytes of a row each
      const int group = half * kBoxColumns / 8 + j;
      ptx::stmatrix_x4_b16(box_chunk(boxes[half], lane % 16, j + lane / 16), packed[0][group], packed[1][group],
                           packed[0][group + 1], packed[1][group + 1]);
    }
    send_box(map, boxes[half], column + half * kBoxColumns, head, row);
  }
}

// 128 columns of e4m3 are one box: `turn` says which.
MLA_FP8_DEVICE void store_box_e4m3(u8 (&boxes)[kBoxes][kBoxRows][kBoxRowBytes], int turn, const TensorMap* map,
                                   const float (&values)[64], float multiplier, i32 column, i32 head, i32 row,
                                   int quad) {
  acquire_box();
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const RowValues lane_row = row_values(values, i);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint4 vector = e4m3_vector(lane_row, part, multiplier, quad);
      *reinterpret_cast<uint4*>(
          box_chunk(boxes[turn], threadIdx.x % 32 / kQuad + i * kLaneRowStep, part * kQuad + quad)) = vector;
    }
  }
  send_box(map, boxes[turn], column, head, row);
}

// Before the CTA ends: shared memory is no longer read.
MLA_FP8_DEVICE void drain_boxes() {
  if (threadIdx.x % 32 == 0) ptx::cp_async_bulk_wait_group_read<0>();
}

}  // namespace mla_fp8
