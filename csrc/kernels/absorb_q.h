// What absorb_q's launcher and kernel share: the kernel's argument and its shared memory.
#pragma once

#include "kernels/lanes.h"
#include "kernels/types.h"

namespace mla_fp8::absorb_q {

inline constexpr int kWarpgroupM = 64;   // rows of one wgmma
inline constexpr int kWarpgroup = 128;   // threads
inline constexpr int kChunkN = 128;      // columns computed and stored at a time: one row of scale blocks
inline constexpr int kTileK = 128;       // D of the resident kernel: a scale group; 128 bytes, the swizzle's width
inline constexpr int kNopeVectors = 8;   // 8 bf16 or fp16 each: a thread's share of its warpgroup's 64x128 of q_nope
inline constexpr int kPeVectors = 4;   // and of its 64x64 q_pe

// One warpgroup's next rows: q_nope as vectors of a quad of lanes, q_pe as a thread's own.
template <bool kStaged>
struct Stage {
  alignas(16) u8 q_nope[kNopeVectors][kWarpgroup][16];
  alignas(16) u8 q_pe[kPeVectors][kWarpgroup][16];
};
template <>
struct Stage<false> {};

// kTileN columns of one head's W_UK stay while row tiles stream past. A lone warpgroup loads to registers, several to stages.
template <int kTileN, int kWarpgroups>
struct SharedStorage {
  alignas(1024) u8 w_uk[kTileN / kChunkN][kChunkN * kTileK];  // 128-byte swizzle: its pattern repeats every 1024 bytes
  Stage<(kWarpgroups > 1)> stage[kWarpgroups];
  u64 full[kTileN / kChunkN];
};

// absorb_q_shared.cuh: each warpgroup has 128 kChunks columns, all have the same 64 rows.
inline constexpr int kSharedStages = 2;
template <int kWarpgroups, int kChunks>
struct SharedRowsStorage {
  alignas(1024) u8 w_uk[kWarpgroups][kChunks][kChunkN * kTileK];
  alignas(1024) u8 rows[2][kWarpgroupM * kTileK];  // e4m3, 128-byte swizzle, in turn
  alignas(16) u8
      stage[kSharedStages][kWarpgroupM * kTileK * 2 / 32 / (kWarpgroups * kWarpgroup)][2][kWarpgroups * kWarpgroup][16];
  float scale[2][kWarpgroupM];
  u64 full[kWarpgroups][kChunks];
};

// absorb_q_phased.cuh: a burst of row tiles, and a ring through which they come.
inline constexpr int kPhasedWarpgroups = 4;  // 128 columns each
inline constexpr int kPhasedThreads = kPhasedWarpgroups * kWarpgroup;
inline constexpr int kPhasedN = kPhasedWarpgroups * kChunkN;
inline constexpr int kPhasedStages = 2;
struct PhasedStage {
  alignas(16) u8 q_nope[2][kPhasedThreads][16];
  alignas(16) u8 q_pe[kPhasedThreads][16];
};
template <int kOutBytes>
struct PhasedStorage {
  static constexpr int kRowsBytes = kWarpgroupM * kTileK;  // of a tile, e4m3, 128-byte swizzle
  static constexpr int kScaleBytes = kWarpgroupM * sizeof(float);
  static constexpr int kPeBytes = 8 * kOutBytes;  // of a thread: a chunk of 8 columns as it is stored
  static constexpr int kBurst = 13;  // tiles
  static constexpr int kBurstWithPe = kOutBytes == 1 ? 9 : 7;
  static constexpr int kTilesBytes = kBurst * (kRowsBytes + kScaleBytes);
  static constexpr int kTilesWithPeBytes = kBurstWithPe * (kRowsBytes + kScaleBytes + kPhasedThreads * kPeBytes);
  alignas(1024) u8 w_uk[kPhasedWarpgroups][kChunkN * kTileK];
  alignas(1024) u8 tiles[kTilesBytes > kTilesWithPeBytes ? kTilesBytes : kTilesWithPeBytes];  // rows, scales, q_pe
  PhasedStage stage[kPhasedStages];
  u64 full[kPhasedWarpgroups];
};

// absorb_q_few.cuh: kTiles tiles of 64 weight rows a warpgroup, and the rows.
template <int kTokens, int kWarpgroups, int kTiles>
struct FewRowsStorage {
  alignas(1024) u8 w_uk[kWarpgroups][kTiles][kWarpgroupM * kTileK];
  alignas(1024) u8 rows[kTokens * kTileK];  // e4m3, 128-byte swizzle
  float scale[kTokens];
  u64 full[kWarpgroups];
};

struct Params {
  TensorMap w_uk;  // e4m3 [H,R,D], boxes of 128 x 128 in lane order (kernels/weights.cuh), 128-byte swizzle
  const u16* q_nope;  // [S,H,D] bf16 or fp16
  const u16* q_pe;  // [S,H,P] like q_nope, or null
  const float* w_uk_scale;  // [H,R/128,D/128]
  const float* out_scale;  // one value, or null
  void* q;  // [S,H,R+P] like q_nope, or e4m3 with out_scale
  i64 q_nope_stride[2];  // s, h
  i64 q_pe_stride[2];  // s, h
  i64 w_uk_scale_stride[3];  // h, r / 128, d / 128
  i64 q_stride[2];  // s, h
  i32 s, h, d, r, pe;
  u32 is_fp16;  // else bf16
  u32 phase_slot;  // of phases.cuh
};

// For D = 128 and 16-byte accesses.
struct Tuned : Schedule {
  static constexpr int kK = kTileK;
  static constexpr int kAlignBytes = kVectorBytes;
};

template <int kTileN_, int kWarpgroups_, int kOutBytes_, int kAlignBytes_>
struct Config : Schedule {
  static constexpr int kTileN = kTileN_;
  static constexpr int kChunks = kTileN / kChunkN;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kTileM = kWarpgroups * kWarpgroupM;
  static constexpr int kK = kTileK;
  static constexpr int kStages = kChunks;
  static constexpr int kThreads = kWarpgroups * kWarpgroup;
  static constexpr bool kStaged = kWarpgroups > 1;
  static constexpr int kOutBytes = kOutBytes_;
  static constexpr int kAlignBytes = kAlignBytes_;
  static constexpr int kStoredColumns = kLaneColumns<kOutBytes>;
  using Params = absorb_q::Params;
  using Shared = SharedStorage<kTileN, kWarpgroups>;
  static_assert(kTileN % kChunkN == 0 && kChunkN == kTileK);
  static_assert(kAlignBytes == kVectorBytes || !kStaged);
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
};

template <int kWarpgroups_, int kChunks_, int kOutBytes_>
struct SharedConfig : Tuned {
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kChunks = kChunks_;  // of 128 columns, of a warpgroup
  static constexpr int kStages = kWarpgroups * kChunks;
  static constexpr int kRowStages = kSharedStages;
  static constexpr int kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kTileM = kWarpgroupM;
  static constexpr int kTileN = kWarpgroups * kChunks * kChunkN;
  static constexpr int kOutBytes = kOutBytes_;
  static constexpr int kStoredColumns = kLaneColumns<kOutBytes>;
  static constexpr bool kLeavesRoom = true;
  static constexpr int kSlots = kWarpgroupM * kParts / kThreads;  // rows, and chunks of q_pe, of a thread
  static constexpr int kSlotRows = kThreads / kParts;  // between a thread's rows
  using Params = absorb_q::Params;
  using Shared = SharedRowsStorage<kWarpgroups, kChunks>;
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
};

template <int kOutBytes_>
struct PhasedConfig : Tuned {
  static constexpr int kStages = kPhasedWarpgroups;
  static constexpr int kThreads = kPhasedThreads;
  static constexpr int kTileM = kWarpgroupM;
  static constexpr int kTileN = kPhasedN;
  static constexpr int kOutBytes = kOutBytes_;
  static constexpr int kStoredColumns = kLaneColumns<kOutBytes>;
  static constexpr bool kPhased = true;
  using Params = absorb_q::Params;
  using Shared = PhasedStorage<kOutBytes>;
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
};

template <int kTokens_, int kWarpgroups_, int kTiles_, int kOutBytes_>
struct FewConfig : Tuned {
  static constexpr int kTokens = kTokens_;
  static constexpr int kTileM = kTokens;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kTiles = kTiles_;  // of a warpgroup
  static constexpr int kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kWarpgroupN = kTiles * kWarpgroupM;
  static constexpr int kTileN = kWarpgroups * kWarpgroupN;
  static constexpr int kStages = kTileN / kChunkN;
  static constexpr int kOutBytes = kOutBytes_;
  static constexpr int kStoredColumns = 2 * kTiles;
  static constexpr bool kLeavesRoom = true, kSwapAb = true;
  static constexpr int kLanes = kTokens * kParts;  // that quantize
  static constexpr int kSlots = (kLanes + kThreads - 1) / kThreads;
  using Params = absorb_q::Params;
  using Shared = FewRowsStorage<kTokens, kWarpgroups, kTiles>;
  static_assert(kLanes % kThreads == 0 || kLanes < kThreads);
};

}  // namespace mla_fp8::absorb_q
