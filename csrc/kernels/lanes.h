// How the lanes of a warp share a row of a tile. For kernels and launchers.
#pragma once

namespace mla_fp8 {

inline constexpr int kQuad = 4;  // lanes that hold a row
inline constexpr int kWarpRows = 32 / kQuad;  // rows of wgmma's D that a warp's quads hold at once
inline constexpr int kWarpgroupWarps = 4;
inline constexpr int kVectorBytes = 16;  // one access of the aligned tiles

inline constexpr int kParts = 8;  // threads that quantize a row's group in shared_rows.cuh
inline constexpr int kMaxSharedBytes = 227 * 1024;  // of a CTA

// What a schedule is unless it says otherwise. Its Config says the rest beside its shared memory.
struct Schedule {
  static constexpr bool kPersistent = true;  // keeps its weights for all row tiles that it takes
  static constexpr bool kLeavesRoom = false;  // the next launch's CTAs fit beside its own
  static constexpr bool kPhased = false;  // reads and writes in turn
  static constexpr bool kSwapAb = false;  // weights are wgmma's A
};

// Columns of a lane that are neighbours in an output of kOutBytes: one access.
template <int kOutBytes>
inline constexpr int kLaneColumns = kVectorBytes / kOutBytes;

}  // namespace mla_fp8
