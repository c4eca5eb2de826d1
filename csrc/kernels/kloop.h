// Shared memory of the kernels that loop over K: a ring of 128x128 weight tiles, which keeps them if all of K fits, and the next rows.
#pragma once

#include "kernels/lanes.h"
#include "kernels/types.h"

namespace mla_fp8::kloop {

inline constexpr int kWarpgroupM = 64;  // rows of one wgmma
inline constexpr int kWarpgroup = 128;  // threads
inline constexpr int kTileN = 128;  // columns: one row of scale blocks
inline constexpr int kTileK = 128;  // a scale group; 128 bytes, the swizzle's width

// Whether the next activations wait in shared memory.
MLA_FP8_HOST_DEVICE constexpr bool is_staged(int align_bytes, int stages) { return align_bytes == 16 && stages > 1; }
MLA_FP8_HOST_DEVICE constexpr int staged_bytes(int align_bytes, int stages, int in_bytes) {
  return is_staged(align_bytes, stages) ? in_bytes : 0;
}

// One warpgroup's 64x128 activations as 16-byte vectors: of bf16 a warp's own 16 rows, of e4m3 a thread's own vectors and its rows' scales. No other
// warp or thread reads them. kInBytes = 0: activations go to registers at once.
template <int kInBytes>
struct Stage {
  alignas(16) u8 vector[kInBytes * kTileK * kWarpgroupM / kWarpgroup / 16][kWarpgroup][16];
};
template <>
struct Stage<1> {
  alignas(16) u8 vector[kTileK * kWarpgroupM / kWarpgroup / 16][kWarpgroup][16];
  float scale[2][kWarpgroup];
};
template <>
struct Stage<0> {};

template <int kStages, int kWarpgroups, int kInBytes>
struct SharedStorage {
  alignas(1024) u8 weights[kStages][kTileN * kTileK];  // 128-byte swizzle: its pattern repeats every 1024 bytes
  Stage<kInBytes> stage[kStages][kWarpgroups];
  u64 full[kStages];
  u64 empty[kStages];
};

// kK: the only K; 0: any.
template <class Params_, int kK_, int kStages_, int kWarpgroups_, int kInBytes_, int kOutBytes_, int kAlignBytes_>
struct Config : Schedule {
  static constexpr int kK = kK_;
  static constexpr int kBlocks = kK_ / kTileK;
  static constexpr int kStages = kStages_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kTileM = kWarpgroups * kWarpgroupM;
  static constexpr int kInBytes = kInBytes_;
  static constexpr int kOutBytes = kOutBytes_;
  static constexpr int kAlignBytes = kAlignBytes_;
  static constexpr bool kStaged = is_staged(kAlignBytes, kStages);
  static constexpr int kTileN = kloop::kTileN;
  static constexpr int kStoredColumns = kLaneColumns<kOutBytes>;
  static constexpr bool kPersistent = kStages > 1;
  using Params = Params_;
  using Shared = SharedStorage<kStages, kWarpgroups, staged_bytes(kAlignBytes, kStages, kInBytes)>;
  static_assert(kBlocks <= kStages);
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
};

}  // namespace mla_fp8::kloop
