// Weights in shared memory: how the copy engine brings them in a schedule's order of rows, and how
// wgmma reads them.
#pragma once

#include "kernels/grid.cuh"
#include "kernels/ptx/bulk_tensor.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/wgmma.cuh"
#include "kernels/sm90/schedules.h"

namespace mla_fp8::sm90 {

inline constexpr int kWgmmaK = 32;
inline constexpr int kSteps = kGroup / kWgmmaK;  // wgmmas a group
inline constexpr u64 kStepDescriptor = kWgmmaK >> 4;  // from one of them to the next

// What wgmma wants to know of a K-major tile of 128-byte rows under the 128-byte swizzle.
MLA_FP8_DEVICE u64 descriptor_of(const u8* tile) {
  constexpr u64 kEightRowsBytes = 8 * kGroup;  // from one 8-row core matrix to the next
  constexpr u64 kSwizzle128B = u64{1} << 62;
  return static_cast<u64>((ptx::shared_address(tile) & 0x3ffffu) >> 4) | u64{1} << 16 | (kEightRowsBytes >> 4) << 32 |
         kSwizzle128B;
}

// Where in the weights kRows rows begin: column k, row n of a head. They come as boxes of
// Schedule::kOrder.
struct WeightPlace {
  i32 k, n, head;
};

// The boxes of kRows rows, in the order of shared memory. With swap AB the boxes of a warpgroup
// interleave, so that all of them begin at the same row; otherwise they lie one after the other.
template <class Schedule, int kRows, class Use>
MLA_FP8_DEVICE void for_boxes(const WeightPlace& at, const Use& use) {
  constexpr WeightOrder kOrder = Schedule::kOrder;
  constexpr int kBoxes = kRows / kOrder.box_rows();
  constexpr bool kInterleaved = kOrder.box[1] < kOrder.extent[1];
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
    const i32 y = kInterleaved ? box * kOrder.box[1] : 0;
    const i32 z = (at.n + (kInterleaved ? 0 : box * kOrder.box_rows())) / kOrder.stride[2];
    use(box * kOrder.box_rows() * kGroup, ptx::BoxOrigin{at.k, 0, y, z, at.head});
  }
}

// One thread, before the wait for predecessors: kRows rows to L2, and their barrier.
template <class Schedule, int kRows>
MLA_FP8_DEVICE void prefetch_weights(const Params& params, const WeightPlace& at, u64* full) {
  for_boxes<Schedule, kRows>(
      at, [&](int, ptx::BoxOrigin origin) { ptx::cp_async_bulk_prefetch_tensor_5d(&params.w, origin); });
  ptx::mbarrier_init(full, 1);
}

// One thread, after it: kRows rows to shared memory; `full` completes when they are there.
template <class Schedule, int kRows>
MLA_FP8_DEVICE void load_weights(const Params& params, const WeightPlace& at, u8* to, u64* full) {
  ptx::mbarrier_arrive_expect_tx(full, kRows * kGroup);
  for_boxes<Schedule, kRows>(at, [&](int offset, ptx::BoxOrigin origin) {
    ptx::cp_async_bulk_tensor_5d(to + offset, &params.w, origin, full);
  });
}

// The prologue: a warp starts the copy of each weight tile of 128 x 128, if the CTA has rows.
template <class C>
MLA_FP8_DEVICE void begin_with_weights(const Params& params, typename C::Shared& shared, const Place& at,
                                       bool has_rows) {
  const int tile = C::kThreads / kWarp - 1 - static_cast<int>(threadIdx.x) / kWarp;
  const bool is_producer = threadIdx.x % kWarp == 0 && tile < C::kStages;
  const WeightPlace weights{tile % C::kBlocks * kGroup, at.slice * C::kTileN + tile / C::kBlocks * kChunkN, at.head};
  begin(is_producer, [&] {
    ptx::prefetch_tensormap(&params.w);
    prefetch_weights<C, kChunkN>(params, weights, &shared.full[tile]);
  });
  if (is_producer && has_rows) load_weights<C, kChunkN>(params, weights, shared.w[tile], &shared.full[tile]);
  __syncwarp();
}

// The scales of the CTA's weight tiles from `first` on, which are numbered as in shared memory.
template <class C, int kTiles>
MLA_FP8_DEVICE void read_weight_scales(float (&scale)[kTiles], const Product& p, const Place& at, int first = 0) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int tile = first + i;
    scale[i] = p.w_scale[at.head * p.w_scale_stride[0] +
                         (at.slice * C::kTileN / kChunkN + tile / C::kBlocks) * p.w_scale_stride[1] +
                         tile % C::kBlocks * p.w_scale_stride[2]];
  }
}

// d [64,kN] = a times b's transpose over one group, both in shared memory: the least term of the
// rows first, whose planes lie a_plane or b_plane bytes apart, the other operand being the same for
// all. It is called between wgmma_fence and wgmma_commit_group. The sums are the same, bit for bit,
// whatever kN is and whichever operand the weights are.
template <int kN, int kTerms>
MLA_FP8_DEVICE void multiply_group(float (&d)[kN / 2], const u8* a, int a_plane, const u8* b, int b_plane) {
#pragma unroll
  for (int i = 0; i < kTerms * kSteps; ++i) {
    const int term = kTerms - 1 - i / kSteps;
    const u64 a_step = descriptor_of(a + term * a_plane) + i % kSteps * kStepDescriptor;
    const u64 b_step = descriptor_of(b + term * b_plane) + i % kSteps * kStepDescriptor;
    if constexpr (kN == 8) {
      ptx::wgmma_m64n8k32_f32_e4m3_e4m3_shared(d, a_step, b_step, i != 0);
    } else if constexpr (kN == 16) {
      ptx::wgmma_m64n16k32_f32_e4m3_e4m3_shared(d, a_step, b_step, i != 0);
    } else if constexpr (kN == 32) {
      ptx::wgmma_m64n32k32_f32_e4m3_e4m3_shared(d, a_step, b_step, i != 0);
    } else {
      static_assert(kN == 128);
      ptx::wgmma_m64n128k32_f32_e4m3_e4m3_shared(d, a_step, b_step, i != 0);
    }
  }
}

}  // namespace mla_fp8::sm90
