// The tiles that are compiled, one line each. From these lines come the kernels' symbols (csrc/kernels/<op>.cu), their
// launch bounds, and the table that select_config chooses from: no tile constant stands anywhere else.
//
// Work is a list of tiles: row tile major, then head, then column tile. A CTA takes tiles blockIdx.x, + gridDim.x, ...; of the SHARED tiles,
// which have the same grid, a run of neighbouring row tiles.
// A persistent tile keeps its weights while it walks down the rows, so its gridDim.x is a multiple of columns = heads *
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

struct Tile {
  const char* symbol;
  Op op;
  int m, n, k;  // rows and columns a CTA makes; k: the only K it takes. 0: any
  int stages;  // weight tiles in flight in shared memory
  int threads;
  int smem_bytes;  // dynamic: sizeof(SharedStorage), or 0
  int align_bytes;  // that activation pointers and strides must have
  int out_bytes;  // an output element: 2 (bf16, fp16) or 1 (e4m3); 0: any
  int ctas_per_sm;  // that registers are limited for (__launch_bounds__); 0: not limited
  int regs;  // most registers a thread, from ctas_per_sm; 0: not limited
  bool persistent;
  // Neighbouring output columns that a lane stores at once: the order of the weights' rows (kernels/weights.cuh); 0: none.
  int lane_columns = 0;
  float start_us = 0;  // what a launch takes longer, or less long, than the model of cost.h says, as measured
  // An SM's time for each further tile where that bounds it, on the scale of the model (cost.h), fitted to an H100 and an H200.
  float serial_us = 0;
};

inline constexpr int kRegistersPerSm = 65536;
inline constexpr int kRegisterStep = 8;
MLA_FP8_HOST_DEVICE constexpr int max_registers(int threads, int ctas_per_sm) {
  const int registers = kRegistersPerSm / (threads * ctas_per_sm) / kRegisterStep * kRegisterStep;
  return registers > 255 ? 255 : registers;
}

}  // namespace mla_fp8

// absorb_q with D = 128: kTileN columns of a head's weights stay in shared memory; 64 rows a warpgroup.
// X(symbol, tile n, warpgroups, output bytes, alignment, CTAs an SM, start µs)
#define MLA_FP8_ABSORB_Q_TILES(X)                 \
  X(absorb_q_n128, 128, 1, 2, 16, 4, 0)           \
  X(absorb_q_m128, 512, 2, 2, 16, 2, -0.18f)      \
  X(absorb_q_m256, 512, 4, 2, 16, 1, 0)           \
  X(absorb_q_unaligned, 128, 1, 2, 2, 3, 0)       \
  X(absorb_q_n128_e4m3, 128, 1, 1, 16, 4, -0.02f) \
  X(absorb_q_m128_e4m3, 512, 2, 1, 16, 2, 0.5f)   \
  X(absorb_q_m256_e4m3, 512, 4, 1, 16, 1, 0)      \
  X(absorb_q_e4m3_unaligned, 128, 1, 1, 2, 3, 0)

// absorb_q with D = 128: 64 rows quantized once for all warpgroups, 128 columns each.
// X(symbol, warpgroups, output bytes, CTAs an SM)
#define MLA_FP8_ABSORB_Q_SHARED_TILES(X) \
  X(absorb_q_n256, 2, 2, 2)              \
  X(absorb_q_n512, 4, 2, 1)              \
  X(absorb_q_n256_e4m3, 2, 1, 2)         \
  X(absorb_q_n512_e4m3, 4, 1, 1)

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
  X(bmm_m64, 0, 4, 1, 2, 16, 2, 1.08f) \
  X(bmm_m128, 0, 4, 2, 2, 16, 1, 0)    \
  X(bmm_unaligned, 0, 4, 1, 2, 1, 2, 0)

// v_up with R = 512 and few rows: 64x128 tiles, a warpgroup for each block of R.
// X(symbol, output bytes)
#define MLA_FP8_V_UP_SPLIT_TILES(X) \
  X(v_up_split, 2)                  \
  X(v_up_split_e4m3, 1)

// v_up with R = 512: 64x128 tiles, rows quantized once for all warpgroups, 32 columns each.
// X(symbol, output bytes, an SM's serial µs a tile)
#define MLA_FP8_V_UP_SHARED_TILES(X) \
  X(v_up_m64, 2, 4.55f)              \
  X(v_up_m64_e4m3, 1, 4.55f)

// 32 rows of one group. Larger tiles were no faster anywhere that matters (docs/notes.md).
// X(symbol, alignment, CTAs an SM)
#define MLA_FP8_QUANTIZE_Q_NOPE_TILES(X) \
  X(quantize_q_nope_m32, 16, 8)          \
  X(quantize_q_nope_m32_unaligned, 2, 8)

namespace mla_fp8 {

#define MLA_FP8_RESIDENT_TILE(symbol, n, warpgroups, out_bytes, align, ctas, start_us) \
  {#symbol,                                                                            \
   Op::kAbsorbQ,                                                                       \
   warpgroups * absorb_q::kWarpgroupM,                                                 \
   n,                                                                                  \
   absorb_q::kTileK,                                                                   \
   n / absorb_q::kChunkN,                                                              \
   warpgroups * absorb_q::kWarpgroup,                                                  \
   static_cast<int>(sizeof(absorb_q::SharedStorage<n, warpgroups>)),                   \
   align,                                                                              \
   out_bytes,                                                                          \
   ctas,                                                                               \
   max_registers(warpgroups * absorb_q::kWarpgroup, ctas),                             \
   true,                                                                               \
   kLaneColumns<out_bytes>,                                                            \
   start_us},
#define MLA_FP8_ABSORB_Q_SHARED_TILE(symbol, warpgroups, out_bytes, ctas) \
  {#symbol,                                                               \
   Op::kAbsorbQ,                                                          \
   absorb_q::kWarpgroupM,                                                 \
   warpgroups * absorb_q::kChunkN,                                        \
   absorb_q::kTileK,                                                      \
   warpgroups,                                                            \
   warpgroups * absorb_q::kWarpgroup,                                     \
   static_cast<int>(sizeof(absorb_q::SharedRowsStorage<warpgroups>)),     \
   16,                                                                    \
   out_bytes,                                                             \
   ctas,                                                                  \
   max_registers(warpgroups * absorb_q::kWarpgroup, ctas),                \
   true,                                                                  \
   kLaneColumns<out_bytes>},
#define MLA_FP8_KLOOP_TILE(op, in_bytes, symbol, k, stages, warpgroups, out_bytes, align, ctas, serial_us)           \
  {#symbol,                                                                                                          \
   op,                                                                                                               \
   warpgroups * kloop::kWarpgroupM,                                                                                  \
   kloop::kTileN,                                                                                                    \
   k,                                                                                                                \
   stages,                                                                                                           \
   warpgroups * kloop::kWarpgroup,                                                                                   \
   static_cast<int>(sizeof(kloop::SharedStorage<stages, warpgroups, kloop::staged_bytes(align, stages, in_bytes)>)), \
   align,                                                                                                            \
   out_bytes,                                                                                                        \
   ctas,                                                                                                             \
   max_registers(warpgroups * kloop::kWarpgroup, ctas),                                                              \
   stages > 1,                                                                                                       \
   kLaneColumns<out_bytes>,                                                                                          \
   0,                                                                                                                \
   serial_us},
#define MLA_FP8_V_UP_R512_TILE(symbol, out_bytes, storage, persistent, serial_us) \
  {#symbol,                                                                       \
   Op::kVUp,                                                                      \
   kloop::kWarpgroupM,                                                            \
   kloop::kTileN,                                                                 \
   v_up::kSplitBlocks * kloop::kTileK,                                            \
   v_up::kSplitBlocks,                                                            \
   v_up::kSplitThreads,                                                           \
   static_cast<int>(sizeof(storage)),                                             \
   16,                                                                            \
   out_bytes,                                                                     \
   1,                                                                             \
   max_registers(v_up::kSplitThreads, 1),                                         \
   persistent,                                                                    \
   v_up::kQuarterColumns,                                                         \
   0,                                                                             \
   serial_us},
#define MLA_FP8_V_UP_SPLIT_TILE(symbol, out_bytes) \
  MLA_FP8_V_UP_R512_TILE(symbol, out_bytes, v_up::SplitStorage, false, 0)
#define MLA_FP8_V_UP_SHARED_TILE(symbol, out_bytes, serial_us) \
  MLA_FP8_V_UP_R512_TILE(symbol, out_bytes, v_up::SharedRowsStorage, true, serial_us)
#define MLA_FP8_QUANTIZE_TILE(symbol, align, ctas) \
  {#symbol,                                        \
   Op::kQuantizeQNope,                             \
   quantize_q_nope::kTileM,                        \
   quantize_q_nope::kGroup,                        \
   0,                                              \
   0,                                              \
   quantize_q_nope::kThreads,                      \
   0,                                              \
   align,                                          \
   0,                                              \
   ctas,                                           \
   max_registers(quantize_q_nope::kThreads, ctas), \
   false},
#define MLA_FP8_ABSORB_Q_KLOOP_TILE(...) MLA_FP8_KLOOP_TILE(Op::kAbsorbQ, 2, __VA_ARGS__)
#define MLA_FP8_V_UP_KLOOP_TILE(...) MLA_FP8_KLOOP_TILE(Op::kVUp, 2, __VA_ARGS__)
#define MLA_FP8_BMM_TILE(...) MLA_FP8_KLOOP_TILE(Op::kBmm, 1, __VA_ARGS__)

inline constexpr Tile kTiles[] = {
    MLA_FP8_ABSORB_Q_TILES(MLA_FP8_RESIDENT_TILE) MLA_FP8_ABSORB_Q_SHARED_TILES(MLA_FP8_ABSORB_Q_SHARED_TILE)
        MLA_FP8_ABSORB_Q_KLOOP_TILES(MLA_FP8_ABSORB_Q_KLOOP_TILE) MLA_FP8_V_UP_SPLIT_TILES(MLA_FP8_V_UP_SPLIT_TILE)
            MLA_FP8_V_UP_SHARED_TILES(MLA_FP8_V_UP_SHARED_TILE) MLA_FP8_V_UP_KLOOP_TILES(MLA_FP8_V_UP_KLOOP_TILE)
                MLA_FP8_BMM_TILES(MLA_FP8_BMM_TILE) MLA_FP8_QUANTIZE_Q_NOPE_TILES(MLA_FP8_QUANTIZE_TILE)};

}  // namespace mla_fp8
