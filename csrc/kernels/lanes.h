// How the lanes of a warp share a row of a tile. For kernels and launchers.
#pragma once

namespace mla_fp8 {

inline constexpr int kQuad = 4;  // lanes that hold a row
inline constexpr int kWarpRows = 32 / kQuad;  // rows of wgmma's D that a warp's quads hold at once
inline constexpr int kWarpgroupWarps = 4;
inline constexpr int kVectorBytes = 16;  // one access of the aligned tiles

// Columns of a lane that are neighbours in an output of kOutBytes: one access.
template <int kOutBytes>
inline constexpr int kLaneColumns = kVectorBytes / kOutBytes;

}  // namespace mla_fp8
