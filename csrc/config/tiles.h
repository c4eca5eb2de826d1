// The tiles that are compiled, one line each. From these lines come the kernels' symbols (csrc/kernels/<op>.cu), their
// launch bounds, and the table that select_config chooses from. What all tiles of a kernel share, such as kloop::kTileN,
// is a constant of the kernel's header (csrc/kernels/<op>.h, kloop.h); no tile constant stands anywhere else.
//
// Work is a list of tiles: row tile major, then head, then column tile. A CTA takes tiles blockIdx.x, + gridDim.x, ...; of v_up's SHARED tiles,
// which have the same grid, a run of neighbouring row tiles.
// A persistent tile keeps its weights while it takes the rows, so its gridDim.x is a multiple of columns = heads *
// column tiles: columns * min(row tiles, max(1, CTAs resident at once / columns)). Others get one CTA a tile.
#pragma once

#include "kernels/absorb_q.h"
#include "kernels/bmm.h"
#include "kernels/kloop.h"
#include "kernels/lanes.h"
#include "kernels/quantize_q_nope.h"
#include "kernels/types.h"
#include "kernels/v_up.h"

namespace mla_fp8 {

enum class Op { kQuantizeQNope, kBmm, kAbsorbQ, kVUp };

inline constexpr int kRegistersPerSm = 65536;
inline constexpr int kRegisterStep = 8;
MLA_FP8_HOST_DEVICE constexpr int max_registers(int threads, int ctas_per_sm) {
  const int registers = kRegistersPerSm / (threads * ctas_per_sm) / kRegisterStep * kRegisterStep;
  return registers > 255 ? 255 : registers;
}

struct Tile {
  const char* symbol;
  Op op;
  int m, n, k;  // rows and columns a CTA makes; k: the only K it takes. 0: any
  int stages;  // weight tiles in flight in shared memory
  int threads;
  int smem_bytes;  // dynamic: sizeof(SharedStorage), or 0
  int align_bytes;  // that activation pointers and strides must have
  int out_bytes;  // an output element: 2 (bf16, fp16) or 1 (e4m3); 0: any
  int ctas_per_sm;  // that registers are limited for (__launch_bounds__)
  int regs;  // most registers a thread, from ctas_per_sm
  bool persistent = false;
  bool leaves_room = false;  // the next launch's CTAs fit beside its own: one CTA an SM is enough, and better than more
  bool phased = false;  // reads and writes in turn (kernels/phases.cuh)
  bool swap_ab = false;  // weights are wgmma's A, their rows in the order of kernels/few_rows.cuh
  // Neighbouring output columns that a lane stores at once: the order of the weights' rows (kernels/weights.cuh); 0: none.
  int lane_columns = 0;
  float start_us = 0;  // what a launch takes longer, or less long, than the model of cost.h says, as measured
  // An SM's time for each further tile where that bounds it, on the scale of the model (cost.h), as measured.
  float serial_us = 0;

  // The same tile, but: it keeps its weights while it takes the rows.
  constexpr Tile persistent_over(int lane_columns_, float serial_us_, bool persistent_ = true) const {
    Tile tile = *this;
    tile.persistent = persistent_;
    tile.lane_columns = lane_columns_;
    tile.serial_us = serial_us_;
    return tile;
  }
  constexpr Tile leaving_room() const {
    Tile tile = *this;
    tile.leaves_room = true;
    return tile;
  }
  constexpr Tile with_swapped_operands() const {
    Tile tile = leaving_room();
    tile.swap_ab = true;
    return tile;
  }
  constexpr Tile in_phases() const {
    Tile tile = *this;
    tile.phased = true;
    return tile;
  }
  constexpr Tile starting(float start_us_) const {
    Tile tile = *this;
    tile.start_us = start_us_;
    return tile;
  }
};

constexpr Tile tile_of(const char* symbol, Op op, int m, int n, int k, int stages, int threads,
                       unsigned long smem_bytes, int align_bytes, int out_bytes, int ctas_per_sm) {
  return {symbol,      op,        m,           n,
          k,           stages,    threads,     static_cast<int>(smem_bytes),
          align_bytes, out_bytes, ctas_per_sm, max_registers(threads, ctas_per_sm)};
}

}  // namespace mla_fp8

// absorb_q with D = 128: kTileN columns of a head's weights stay in shared memory; 64 rows a warpgroup.
// X(symbol, tile n, warpgroups, output bytes, alignment, CTAs an SM, start µs)
#define MLA_FP8_ABSORB_Q_TILES(X)                 \
  X(absorb_q_n128, 128, 1, 2, 16, 4, 0.05f)       \
  X(absorb_q_m128, 512, 2, 2, 16, 2, 0)           \
  X(absorb_q_unaligned, 128, 1, 2, 2, 3, 0)       \
  X(absorb_q_n128_e4m3, 128, 1, 1, 16, 4, -0.15f) \
  X(absorb_q_m128_e4m3, 512, 2, 1, 16, 2, 0)      \
  X(absorb_q_e4m3_unaligned, 128, 1, 1, 2, 3, 0)

// absorb_q with D = 128 and few rows: operands swapped; kTokens rows, 64 columns a tile of a warpgroup.
// X(symbol, tokens, warpgroups, tiles a warpgroup, output bytes, CTAs an SM, start µs, an SM's serial µs a tile)
#define MLA_FP8_ABSORB_Q_FEW_TILES(X)                \
  X(absorb_q_s16, 16, 1, 2, 2, 8, -0.05f, 0.5f)      \
  X(absorb_q_s32, 32, 2, 4, 2, 2, 0, 3.2f)           \
  X(absorb_q_s16_e4m3, 16, 1, 2, 1, 8, -0.15f, 0.5f) \
  X(absorb_q_s32_e4m3, 32, 2, 4, 1, 2, 0.15f, 2.9f)

// absorb_q with D = 128: 64 rows quantized once for all warpgroups, and room for the next launch beside it.
// X(symbol, warpgroups, chunks of 128 columns a warpgroup, output bytes, CTAs an SM, start µs)
#define MLA_FP8_ABSORB_Q_SHARED_TILES(X) \
  X(absorb_q_n512, 2, 2, 2, 2, -0.1f)    \
  X(absorb_q_n512_e4m3, 2, 2, 1, 2, 0.11f)

// absorb_q with D = 128 and many rows: bursts of tiles of 64 rows and 512 columns, read and written in phases.
// X(symbol, output bytes, start µs)
#define MLA_FP8_ABSORB_Q_PHASED_TILES(X) \
  X(absorb_q_phased, 2, 1.2f)            \
  X(absorb_q_phased_e4m3, 1, 0.4f)

// Tiles of 128 columns and 64 rows a warpgroup, weights through a ring of stages that keeps them if all of K fits.
// X(symbol, the only k (0: any), stages, warpgroups, output bytes, alignment, CTAs an SM, an SM's serial µs a tile)
#define MLA_FP8_ABSORB_Q_KLOOP_TILES(X)            \
  X(absorb_q_kloop, 0, 4, 1, 2, 16, 1, 0)          \
  X(absorb_q_kloop_unaligned, 0, 4, 1, 2, 2, 2, 0) \
  X(absorb_q_kloop_e4m3, 0, 4, 1, 1, 16, 1, 0)     \
  X(absorb_q_kloop_e4m3_unaligned, 0, 4, 1, 1, 2, 2, 0)

#define MLA_FP8_V_UP_KLOOP_TILES(X)       \
  X(v_up_m128, 0, 4, 2, 2, 16, 1, 0)      \
  X(v_up_unaligned, 0, 4, 1, 2, 2, 2, 0)  \
  X(v_up_m128_e4m3, 0, 4, 2, 1, 16, 1, 0) \
  X(v_up_e4m3_unaligned, 0, 4, 1, 1, 2, 2, 0)

#define MLA_FP8_BMM_TILES(X)           \
  X(bmm_k128, 128, 1, 1, 2, 16, 4, 0)  \
  X(bmm_m64, 0, 4, 1, 2, 16, 2, 1.11f) \
  X(bmm_m128, 0, 4, 2, 2, 16, 1, 0)    \
  X(bmm_unaligned, 0, 4, 1, 2, 1, 2, 0)

// v_up with R = 512: 64x128 tiles, rows quantized once for all warpgroups, 32 columns each.
// X(symbol, output bytes, start µs, an SM's serial µs a tile)
#define MLA_FP8_V_UP_SHARED_TILES(X) \
  X(v_up_m64, 2, 0.05f, 4.55f)       \
  X(v_up_m64_e4m3, 1, 0.05f, 4.55f)

// v_up with R = 512 and few rows: operands swapped.
// X(symbol, tokens, output bytes, CTAs an SM, start µs, an SM's serial µs a tile)
#define MLA_FP8_V_UP_FEW_TILES(X)          \
  X(v_up_s8, 8, 2, 3, -0.25f, 1.5f)        \
  X(v_up_s16, 16, 2, 2, -0.1f, 1.8f)       \
  X(v_up_s32, 32, 2, 2, 0, 2.7f)           \
  X(v_up_s8_e4m3, 8, 1, 3, -0.3f, 1.5f)    \
  X(v_up_s16_e4m3, 16, 1, 2, -0.15f, 1.9f) \
  X(v_up_s32_e4m3, 32, 1, 2, 0, 2.9f)

// 32 rows of one group. Larger tiles were no faster anywhere that matters (docs/notes.md).
// X(symbol, alignment, CTAs an SM)
#define MLA_FP8_QUANTIZE_Q_NOPE_TILES(X) \
  X(quantize_q_nope_m32, 16, 8)          \
  X(quantize_q_nope_m32_unaligned, 2, 8)

namespace mla_fp8 {

#define MLA_FP8_RESIDENT_TILE(symbol, n, warpgroups, out_bytes, align, ctas, start_us)                               \
  tile_of(#symbol, Op::kAbsorbQ, warpgroups* absorb_q::kWarpgroupM, n, absorb_q::kTileK, n / absorb_q::kChunkN,      \
          warpgroups * absorb_q::kWarpgroup, sizeof(absorb_q::SharedStorage<n, warpgroups>), align, out_bytes, ctas) \
      .persistent_over(kLaneColumns<out_bytes>, 0)                                                                   \
      .starting(start_us),
#define MLA_FP8_ABSORB_Q_FEW_TILE(symbol, tokens, warpgroups, tiles, out_bytes, ctas, start_us, serial_us)   \
  tile_of(#symbol, Op::kAbsorbQ, tokens, warpgroups * tiles * absorb_q::kWarpgroupM, absorb_q::kTileK,       \
          warpgroups * tiles * absorb_q::kWarpgroupM / absorb_q::kChunkN, warpgroups * absorb_q::kWarpgroup, \
          sizeof(absorb_q::FewRowsStorage<tokens, warpgroups, tiles>), kVectorBytes, out_bytes, ctas)        \
      .persistent_over(2 * tiles, serial_us)                                                                 \
      .starting(start_us)                                                                                    \
      .with_swapped_operands(),
#define MLA_FP8_ABSORB_Q_SHARED_TILE(symbol, warpgroups, chunks, out_bytes, ctas, start_us)                        \
  tile_of(#symbol, Op::kAbsorbQ, absorb_q::kWarpgroupM, warpgroups * chunks * absorb_q::kChunkN, absorb_q::kTileK, \
          warpgroups * chunks, warpgroups * absorb_q::kWarpgroup,                                                  \
          sizeof(absorb_q::SharedRowsStorage<warpgroups, chunks>), kVectorBytes, out_bytes, ctas)                  \
      .persistent_over(kLaneColumns<out_bytes>, 0)                                                                 \
      .starting(start_us)                                                                                          \
      .leaving_room(),
#define MLA_FP8_ABSORB_Q_PHASED_TILE(symbol, out_bytes, start_us)                                            \
  tile_of(#symbol, Op::kAbsorbQ, absorb_q::kWarpgroupM, absorb_q::kPhasedN, absorb_q::kTileK,                \
          absorb_q::kPhasedWarpgroups, absorb_q::kPhasedThreads, sizeof(absorb_q::PhasedStorage<out_bytes>), \
          kVectorBytes, out_bytes, 1)                                                                        \
      .persistent_over(kLaneColumns<out_bytes>, 0)                                                           \
      .starting(start_us)                                                                                    \
      .in_phases(),
#define MLA_FP8_V_UP_SHARED_TILE(symbol, out_bytes, start_us, serial_us)                                               \
  tile_of(#symbol, Op::kVUp, kloop::kWarpgroupM, kloop::kTileN, v_up::kResidentK, v_up::kBlocks, v_up::kSharedThreads, \
          sizeof(v_up::SharedRowsStorage), kVectorBytes, out_bytes, 1)                                                 \
      .persistent_over(v_up::kQuarterColumns, serial_us)                                                               \
      .starting(start_us),
#define MLA_FP8_V_UP_FEW_TILE(symbol, tokens, out_bytes, ctas, start_us, serial_us)                     \
  tile_of(#symbol, Op::kVUp, tokens, kloop::kTileN, v_up::kResidentK, v_up::kBlocks, v_up::kFewThreads, \
          sizeof(v_up::FewRowsStorage<tokens>), kVectorBytes, out_bytes, ctas)                          \
      .persistent_over(2, serial_us)                                                                    \
      .starting(start_us)                                                                               \
      .with_swapped_operands(),
#define MLA_FP8_KLOOP_TILE(op, in_bytes, symbol, k, stages, warpgroups, out_bytes, align, ctas, serial_us)       \
  tile_of(#symbol, op, warpgroups* kloop::kWarpgroupM, kloop::kTileN, k, stages, warpgroups* kloop::kWarpgroup,  \
          sizeof(kloop::SharedStorage<stages, warpgroups, kloop::staged_bytes(align, stages, in_bytes)>), align, \
          out_bytes, ctas)                                                                                       \
      .persistent_over(kLaneColumns<out_bytes>, serial_us, (stages > 1)),
#define MLA_FP8_ABSORB_Q_KLOOP_TILE(...) MLA_FP8_KLOOP_TILE(Op::kAbsorbQ, 2, __VA_ARGS__)
#define MLA_FP8_V_UP_KLOOP_TILE(...) MLA_FP8_KLOOP_TILE(Op::kVUp, 2, __VA_ARGS__)
#define MLA_FP8_BMM_TILE(...) MLA_FP8_KLOOP_TILE(Op::kBmm, 1, __VA_ARGS__)
#define MLA_FP8_QUANTIZE_TILE(symbol, align, ctas)                                             \
  tile_of(#symbol, Op::kQuantizeQNope, quantize_q_nope::kTileM, quantize_q_nope::kGroup, 0, 0, \
          quantize_q_nope::kThreads, 0, align, 0, ctas),

inline constexpr Tile kTiles[] = {
    MLA_FP8_ABSORB_Q_TILES(MLA_FP8_RESIDENT_TILE) MLA_FP8_ABSORB_Q_SHARED_TILES(MLA_FP8_ABSORB_Q_SHARED_TILE)
        MLA_FP8_ABSORB_Q_PHASED_TILES(MLA_FP8_ABSORB_Q_PHASED_TILE)
            MLA_FP8_ABSORB_Q_FEW_TILES(MLA_FP8_ABSORB_Q_FEW_TILE)
                MLA_FP8_ABSORB_Q_KLOOP_TILES(MLA_FP8_ABSORB_Q_KLOOP_TILE)
                    MLA_FP8_V_UP_SHARED_TILES(MLA_FP8_V_UP_SHARED_TILE) MLA_FP8_V_UP_FEW_TILES(MLA_FP8_V_UP_FEW_TILE)
                        MLA_FP8_V_UP_KLOOP_TILES(MLA_FP8_V_UP_KLOOP_TILE) MLA_FP8_BMM_TILES(MLA_FP8_BMM_TILE)
                            MLA_FP8_QUANTIZE_Q_NOPE_TILES(MLA_FP8_QUANTIZE_TILE)};

}  // namespace mla_fp8
