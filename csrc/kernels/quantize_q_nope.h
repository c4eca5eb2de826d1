// What quantize_q_nope's launcher and kernel share: the tile and the kernel's argument. It has no
// shared memory.
#pragma once

#include "constants.h"
#include "kernels/schedule.h"
#include "types.h"

namespace mla_fp8::quantize_q_nope {

inline constexpr int kLanesPerGroup = 8;  // a quarter of a warp owns a row of the tile
inline constexpr int kWarp = 32, kRowsPerWarp = kWarp / kLanesPerGroup;
inline constexpr int kThreads = 256;  // or as many warps as the rows need, if these are fewer
inline constexpr int kTileM = kThreads / kLanesPerGroup;
inline constexpr int kLoadBytes = 16;    // one load of the aligned tile
inline constexpr int kStoreBytes = 8;    // one store of the aligned tile
inline constexpr int kElementBytes = 2;  // one load of the unaligned tile; it stores single bytes

struct Params {
  const void* q_nope;       // [s, heads, groups * 128], bf16 or fp16
  i64 q_nope_stride[2];     // s, h
  u8* q_val;                // [heads, rows, groups * 128], e4m3
  i64 q_val_stride[2];      // h, m
  float* q_scale;           // [heads, rows, groups]
  i64 q_scale_stride[3];    // h, m, group
  i64 s;                    // rows read
  i64 rows;                 // rows written: those past s are zeros
  i64 tiles;                // row tiles x heads x groups
  u64 columns;              // heads x groups
  u32 groups;
  float amax_floor;
  u32 is_fp16;              // else bf16
};

struct NoStorage {};

// 32 rows of one group. Larger tiles were no faster anywhere that matters (docs/notes.md).
template <int kAlignBytes_>
struct Rows {
  static constexpr int kTileM = quantize_q_nope::kTileM;
  static constexpr int kTileN = kScaleGroup;
  static constexpr int kK = 0;
  static constexpr int kStages = 0;
  static constexpr int kThreads = quantize_q_nope::kThreads;
  static constexpr int kOutBytes = 0;
  static constexpr int kAlignBytes = kAlignBytes_;
  static constexpr bool kPersistent = false, kLeavesRoom = false, kPhased = false;
  static constexpr int kMostTerms = 1;
  static constexpr WeightOrder kOrder{};  // it has no weights
  static constexpr bool kAligned = kAlignBytes == kLoadBytes;
  using Params = quantize_q_nope::Params;
  using Shared = NoStorage;
  static_assert(kAligned || kAlignBytes == kElementBytes);
};

}  // namespace mla_fp8::quantize_q_nope
