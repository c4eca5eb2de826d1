// A compiled tile as select_config and launchers know it, and the tables of all of them.
//
// Work is a list of tiles: row tile major, then head, then column tile. A CTA takes every
// gridDim.x-th tile from tile blockIdx.x on. A persistent tile keeps its weights for all row tiles
// that it takes, so its gridDim.x is a multiple of columns = heads * column tiles:
// `columns * min(row tiles, max(1, CTAs resident at once / columns))`. Other tiles get one CTA
// each.
#pragma once

#include <array>
#include <type_traits>

#include "kernels/schedule.h"
#include "kernels/sm90/tiles.h"
#include "product.h"

namespace mla_fp8 {

constexpr int max_registers(int threads, int ctas_per_sm) {
  const int registers = kRegistersPerSm / (threads * ctas_per_sm) / kRegisterStep * kRegisterStep;
  return registers > 255 ? 255 : registers;
}

struct Tile {
  const char* symbol;
  Op op;
  int capability;  // of the devices that it runs on: 90 is compute capability 9.0
  int m, n, k;  // rows and columns a CTA makes; k: the only K it takes. 0: any
  int stages;  // weight tiles in flight in shared memory
  int threads;
  int smem_bytes;  // dynamic
  int align_bytes;  // that activation pointers and strides must have
  int terms;  // the most that it splits activations into
  int out_bytes;  // an output element: 2 (bf16, fp16) or 1 (e4m3); 0: any
  int ctas_per_sm;  // that registers are limited for (__launch_bounds__)
  int regs;  // most registers a thread, from ctas_per_sm
  bool persistent;
  // The next launch's CTAs fit beside its own: one CTA an SM is enough, and better than more.
  bool leaves_room;
  bool phased;  // reads and writes in turn (kernels/phases.cuh)
  // The cost model's times, fitted to what was measured (cost.h).
  double start_us;  // of a launch, beyond an empty one
  double first_us;  // of an SM's first tile
  double next_us;  // of every further one
  double term_us;  // that each of these takes longer for every term beyond the first
};

template <class Schedule>
constexpr Tile tile_of(int capability, const char* symbol, Op op, int ctas_per_sm, double start_us, double first_us,
                       double next_us, double term_us) {
  return {symbol,
          op,
          capability,
          Schedule::kTileM,
          Schedule::kTileN,
          Schedule::kK,
          Schedule::kStages,
          Schedule::kThreads,
          std::is_empty_v<typename Schedule::Shared> ? 0 : static_cast<int>(sizeof(typename Schedule::Shared)),
          Schedule::kAlignBytes,
          Schedule::kMostTerms,
          Schedule::kOutBytes,
          ctas_per_sm,
          max_registers(Schedule::kThreads, ctas_per_sm),
          Schedule::kPersistent,
          Schedule::kLeavesRoom,
          Schedule::kPhased,
          start_us,
          first_us,
          next_us,
          term_us};
}

template <class T, size_t... kSizes>
constexpr auto joined(const T (&... tables)[kSizes]) {
  std::array<T, (kSizes + ...)> all{};
  size_t size = 0;
  const auto append = [&](const auto& table) {
    for (const T& line : table) all[size++] = line;
  };
  (append(tables), ...);
  return all;
}

// What there are kernels for, in csrc/kernels/sm<capability>/.
struct Architecture {
  int capability;
  const char* gpus;
};

#define MLA_FP8_TILE(symbol, op, schedule, ctas_per_sm, ...) \
  tile_of<MLA_FP8_SCHEDULE(schedule)>(kArchitecture.capability, #symbol, Op::op, ctas_per_sm, __VA_ARGS__),
#define MLA_FP8_WEIGHT_ORDER(symbol, op, schedule, ...) MLA_FP8_SCHEDULE(schedule)::kOrder,

namespace sm90 {
inline constexpr Architecture kArchitecture = {90, "H100, H200"};
inline constexpr Tile kTiles[] = {MLA_FP8_SM90_TILES(MLA_FP8_TILE)};
inline constexpr WeightOrder kWeightOrders[] = {MLA_FP8_SM90_TILES(MLA_FP8_WEIGHT_ORDER)};
}  // namespace sm90

#undef MLA_FP8_TILE
#undef MLA_FP8_WEIGHT_ORDER

// Those of all architectures, in one order.
inline constexpr Architecture kArchitectures[] = {sm90::kArchitecture};
inline constexpr auto kTiles = joined(sm90::kTiles);
inline constexpr auto kWeightOrders = joined(sm90::kWeightOrders);  // of each tile in kTiles

}  // namespace mla_fp8
