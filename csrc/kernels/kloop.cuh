// 1. acc[r,n] = sum over blocks k of K, ascending, of  p_k[r,n] * (scale_a[r,k] * scale_w[n/128,k]),  p_k = a[r,128 k..] . w[n,128 k..]
//
// 2. Tensors   a by a Source, 128 columns at a time; w [.,N,K] e4m3 by tensor map; scale_w fp32, any strides. K is any multiple of 128.
//
// 3. Grid      a CTA makes 64x128 tiles of one head and one column tile (config/tiles.h).
//
// 4. Warps     kWarpgroups warpgroups, 64 rows each; the last warp's first lane also starts the copies of weights. Registers: 64 sums, 64 of p,
//              16 of the A fragment, 32 of raw rows. K = 128 has neither sums beside p nor stages.
//
// 5. Pipeline  what           producer -> consumer            arrivals      bytes
//              full[stage]    copy engine -> all              1             16384
//              empty[stage]   all -> the producer             1 a warp      -
//              cp.async batch a thread -> itself (e4m3)       -             kStages batches under way
//                             a warp -> itself (bf16)         32            128 a thread, kStages batches under way
//              K <= 128 kStages: every weight tile is loaded once and stays for all row tiles; empty is not used.
//
// 6. Shared memory  weights kStages x 16384 bytes, 128-byte swizzle; stage kStages x kWarpgroups x (16384 bf16, 9216 e4m3; none with one
//              stage or unaligned activations: these go to registers a block at a time); full, empty 8 bytes a stage each.
//
// 7. Cost      of the op: v_up.cuh, bmm.cuh. Weights cross from L2 once a CTA if they stay, else once a row tile.
//
// 8. Numerics  p_k: fp32 sums of the tensor core over 128; then one fp32 product of the scales and one fused multiply-add a block, so the
//              bits depend neither on the grid nor on the number of stages.
#pragma once

#include "kernels/fragment.cuh"
#include "kernels/kloop.h"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/griddepcontrol.cuh"
#include "kernels/weights.cuh"

namespace mla_fp8::kloop {

static_assert(kTileN == kGroup && kTileK == kGroup);

struct Weights {
  const TensorMap* map;  // [heads,N,K]
  const float* scale;  // of this head and column tile
  i64 scale_step;  // to the next block of K
  i32 head, first_column, blocks;
};

template <class Config>
struct Ring {
  static constexpr int kStages = Config::kStages;
  typename Config::Shared& shared;
  const Weights& weights;
  i64 total;  // tiles to load in all
  i64 used = 0;  // tiles multiplied so far

  MLA_FP8_DEVICE bool stays() const { return Config::kBlocks != 0 || weights.blocks <= kStages; }

  // The thread that starts copies: in the warp with the fewest rows.
  static MLA_FP8_DEVICE bool is_producer() { return threadIdx.x == Config::kThreads - 32; }

  // Producer: into its stage, which is free.
  MLA_FP8_DEVICE void fill(i64 tile) {
    const int stage = static_cast<int>(tile % kStages);
    load_weight_tile<kLaneColumns<Config::kOutBytes>>(shared.weights[stage], weights.map,
                                                      static_cast<i32>(tile % weights.blocks) * kTileK,
                                                      weights.first_column, weights.head, &shared.full[stage]);
  }

  // Before griddepcontrol_wait: barriers, and the first tiles into L2.
  MLA_FP8_DEVICE void prepare() {
    if (!is_producer()) return;
    ptx::prefetch_tensormap(weights.map);
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      if (stage < weights.blocks) {
        prefetch_weight_tile<kLaneColumns<Config::kOutBytes>>(weights.map, stage * kTileK, weights.first_column,
                                                              weights.head);
      }
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], Config::kThreads / 32);
    }
    ptx::fence_mbarrier_init_release_cluster();
  }

  MLA_FP8_DEVICE void start() {
    if (!is_producer()) return;
    for (i64 tile = 0; tile < kStages && tile < total; ++tile) fill(tile);
  }

  MLA_FP8_DEVICE const u8* acquire(int block) {
    const int stage = stays() ? block : static_cast<int>(used % kStages);
    wait(&shared.full[stage], stays() ? 0 : static_cast<u32>(used / kStages) & 1);
    return shared.weights[stage];
  }

  MLA_FP8_DEVICE void release() {
    if (stays()) return;
    const int stage = static_cast<int>(used % kStages);
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
    if (is_producer() && used + kStages < total) {
      wait(&shared.empty[stage], static_cast<u32>(used / kStages) & 1);
      fill(used + kStages);
    }
    __syncwarp();
    ++used;
  }
};

// Source: fetch(Stage&, row, block) and consume(Stage&, Fragment&), or load(row, block, Fragment&), for the lane's rows `row` and row + 8.
// finish(row, sums): after all of K.
template <class Config, class Source, class Finish>
MLA_FP8_DEVICE void run(const Weights& weights, const Place& at, i64 rows, typename Config::Shared& shared,
                        const Source& source, const Finish& finish) {
  constexpr int kStages = Config::kStages;
  const i64 row_tiles = (rows + Config::kTileM - 1) / Config::kTileM;
  const i64 own_row_tiles = (row_tiles - at.row_tile + at.row_step - 1) / at.row_step;
  Ring<Config> ring{shared, weights, 0};
  ring.total = own_row_tiles <= 0 ? 0 : ring.stays() ? weights.blocks : own_row_tiles * weights.blocks;
  ring.prepare();
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  ring.start();
  __syncwarp();

  const int warpgroup = threadIdx.x / kWarpgroup;
  const i64 lane_row = warpgroup * kWarpgroupM + lane_place().row;
  i64 fetched_tile = at.row_tile;
  i32 fetched_block = 0;
  const auto fetch = [&](int stage) {
    if constexpr (Config::kStaged) {
      if (fetched_tile < row_tiles) {
        source.fetch(shared.stage[stage][warpgroup], fetched_tile * Config::kTileM + lane_row, fetched_block);
        if (++fetched_block == weights.blocks) {
          fetched_block = 0;
          fetched_tile += at.row_step;
        }
      }
      ptx::cp_async_commit_group();
    }
  };
  for (int stage = 0; stage < kStages; ++stage) fetch(stage);

  int stage = 0;
  for (i64 row_tile = at.row_tile; row_tile < row_tiles; row_tile += at.row_step) {
    const i64 row = row_tile * Config::kTileM + lane_row;
    float sums[64];
#pragma unroll
    for (float& sum : sums) sum = 0;
    const i32 blocks = Config::kBlocks != 0 ? Config::kBlocks : weights.blocks;
#pragma unroll 1
    for (i32 block = 0; block < blocks; ++block) {
      const float w_scale = weights.scale[block * weights.scale_step];
      Fragment fragment;
      if constexpr (Config::kStaged) {
        ptx::cp_async_wait_group<kStages - 1>();
        source.consume(shared.stage[stage][warpgroup], fragment);
        fetch(stage);
        stage = stage + 1 == kStages ? 0 : stage + 1;
      } else {
        source.load(row, block, fragment);
      }
      float p[64];
      multiply(p, fragment, ring.acquire(block));
      ring.release();
      float scale[kLaneRows];
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) scale[i] = __fmul_rn(fragment.scale[i], w_scale);
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[i] = __fmaf_rn(p[i], scale[i / 2 % 2], sums[i]);
    }
    finish(row, sums);
  }
}

// Activations in bf16 or fp16, quantized on the way.
template <int kAlignBytes>
struct QuantizingSource {
  const u16* from;  // the head's
  i64 row_stride;
  i64 rows;
  bool is_fp16;
  int quad;

  static constexpr int kWarpRows = kWarpgroupM / (kWarpgroup / 32);
  static constexpr int kRowVectors = 2 * kTileK / kVectorBytes;

  // A row's 16-byte vector in the warp's part of a stage. Pairs of vectors are exchanged by row, so that 16 lanes' 8 bytes are in 32 banks.
  static MLA_FP8_DEVICE u8* place(Stage<2>& stage, int warp_row, int vector) {
    u8* rows = stage.vector[0][0] + threadIdx.x % kWarpgroup / 32 * (kWarpRows * 2 * kTileK);
    return rows + warp_row * (2 * kTileK) + (vector ^ warp_row % kQuad * 2) * kVectorBytes;
  }

  MLA_FP8_DEVICE void fetch(Stage<2>& stage, i64 row, i32 block) const {
    const int lane = threadIdx.x % 32;
    const i64 first_row = row - lane / kQuad;  // of the warp's
#pragma unroll
    for (int i = 0; i < kWarpRows; i += 32 / kRowVectors) {
      const int warp_row = i + lane / kRowVectors;
      const bool exists = first_row + warp_row < rows;
      ptx::cp_async_cg_16(
          place(stage, warp_row, lane % kRowVectors),
          from + (exists ? first_row + warp_row : 0) * row_stride + block * kTileK + lane % kRowVectors * 8,
          exists ? kVectorBytes : 0);
    }
  }

  MLA_FP8_DEVICE void consume(Stage<2>& stage, Fragment& fragment) const {
    const int lane = threadIdx.x % 32;
    RawRow raw[kLaneRows];
    __syncwarp();  // every lane has waited for its copies
#pragma unroll
    for (int i = 0; i < 2 * kLaneRows * kSteps; ++i) {
      const int plane = i / 2;
      load_shared_half(
          raw[plane / kSteps].word[plane % kSteps] + i % 2 * 2,
          place(stage, lane / kQuad + plane / kSteps * kLaneRowStep, plane % kSteps * kQuad + i % 2 * 2 + quad / 2) +
              quad % 2 * 8);
    }
    __syncwarp();  // the next rows may come
    quantize(raw, is_fp16, fragment);
  }

  MLA_FP8_DEVICE void load(i64 row, i32 block, Fragment& fragment) const {
    RawRow raw[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const i64 lane_row = row + i * kLaneRowStep;
      load_row<kAlignBytes>(raw[i], from + lane_row * row_stride + block * kTileK, lane_row < rows, quad);
    }
    quantize(raw, is_fp16, fragment);
  }
};

}  // namespace mla_fp8::kloop
