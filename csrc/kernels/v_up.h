// What v_up's launcher and kernels share: the kernels' argument, and the shared memory of those that are not kloop.cuh's.
#pragma once

#include "kernels/kloop.h"
#include "kernels/lanes.h"
#include "kernels/types.h"

namespace mla_fp8::v_up {

// v_up_shared.cuh and v_up_few.cuh: all of R stays.
inline constexpr int kBlocks = 4;  // of R
inline constexpr int kResidentK = kBlocks * kloop::kTileK;

// v_up_shared.cuh: the same 64 rows for all warpgroups, 32 columns each.
inline constexpr int kSharedWarpgroups = 4;
inline constexpr int kSharedThreads = kSharedWarpgroups * kloop::kWarpgroup;
inline constexpr int kQuarter = kloop::kTileN / kSharedWarpgroups;  // columns of a warpgroup
inline constexpr int kQuarterColumns = kQuarter / kQuad;  // neighbours that a lane stores at once
struct SharedRowsStorage {
  alignas(1024) u8 w_uv[kBlocks][kloop::kTileN * kloop::kTileK];
  alignas(1024) u8 rows[2][kBlocks][kloop::kWarpgroupM * kloop::kTileK];  // e4m3, 128-byte swizzle, in turn
  float scale[2][kBlocks][kloop::kWarpgroupM];
  float amax[2][kSharedWarpgroups][kloop::kWarpgroupM];  // of each quarter of the columns
  u64 full[kBlocks];
};

// v_up_few.cuh: two warpgroups, each with 64 of the weights' rows and all of R.
inline constexpr int kFewWarpgroups = 2;
inline constexpr int kFewThreads = kFewWarpgroups * kloop::kWarpgroup;
inline constexpr int kFewLanes = 32;  // that quantize a row
template <int kTokens>
struct FewRowsStorage {
  alignas(1024) u8 w_uv[kBlocks][kFewWarpgroups][kloop::kTileN / kFewWarpgroups * kloop::kTileK];
  alignas(1024) u8 rows[kBlocks][kTokens * kloop::kTileK];  // e4m3, 128-byte swizzle
  float scale[kBlocks][kTokens];
  float amax[kFewThreads / 32][kTokens];  // of each warp's columns
  float multiplier[kTokens];
  u64 full[kBlocks];
};

struct Params {
  TensorMap w_uv;  // e4m3 [H,V,R], boxes of 128 x 128 in lane order (kernels/weights.cuh), 128-byte swizzle
  const u16* o_latent;  // [S,H,R] bf16 or fp16
  const float* w_uv_scale;  // [H,V/128,R/128]
  const float* out_scale;  // one value: v is e4m3; or null
  void* v;  // [S,H,V] like o_latent, or e4m3
  float* v_scale;  // [S,H]: v is e4m3 in groups of V = 128; or null
  i64 o_latent_stride[2];  // s, h
  i64 w_uv_scale_stride[3];  // h, v / 128, r / 128
  i64 v_stride[2];  // s, h
  i64 v_scale_stride[2];  // s, h
  i32 s, h, r, v_dim;
  u32 is_fp16;  // else bf16
};

// For R = 512 and 16-byte accesses.
struct Tuned : Schedule {
  static constexpr int kTileN = kloop::kTileN;
  static constexpr int kK = kResidentK;
  static constexpr int kStages = kBlocks;
  static constexpr int kAlignBytes = kVectorBytes;
};

template <int kOutBytes_>
struct SharedConfig : Tuned {
  static constexpr int kTileM = kloop::kWarpgroupM;
  static constexpr int kThreads = kSharedThreads;
  static constexpr int kOutBytes = kOutBytes_;
  static constexpr int kStoredColumns = kQuarterColumns;
  using Params = v_up::Params;
  using Shared = SharedRowsStorage;
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
};

template <int kTokens_, int kOutBytes_>
struct FewConfig : Tuned {
  static constexpr int kTokens = kTokens_;
  static constexpr int kTileM = kTokens;
  static constexpr int kThreads = kFewThreads;
  static constexpr int kOutBytes = kOutBytes_;
  static constexpr int kStoredColumns = 2;
  static constexpr bool kLeavesRoom = true, kSwapAb = true;
  using Params = v_up::Params;
  using Shared = FewRowsStorage<kTokens>;
};

}  // namespace mla_fp8::v_up
