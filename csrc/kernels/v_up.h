// What v_up's launcher and kernels share: the kernels' argument, and the shared memory of those that are not kloop.cuh's.
#pragma once

#include "kernels/kloop.h"
#include "kernels/lanes.h"
#include "kernels/types.h"

namespace mla_fp8::v_up {

// The split kernel: a warpgroup for each of R's blocks, whose products meet here.
inline constexpr int kSplitBlocks = 4;  // R = 512
inline constexpr int kQuarter = kloop::kTileN / kSplitBlocks;  // columns that a warpgroup stores
inline constexpr int kQuarterColumns = kQuarter / kQuad;  // neighbours that a lane stores at once
inline constexpr int kSplitThreads = kSplitBlocks * kloop::kWarpgroup;
struct SplitStorage {
  alignas(1024)
      u8 w_uv[kSplitBlocks][kloop::kTileN * kloop::kTileK];  // 128-byte swizzle: its pattern repeats every 1024 bytes
  float product[kSplitBlocks][kloop::kTileN / 8][kloop::kWarpgroup][4];  // accumulators as their owner holds them
  float scale[kSplitBlocks][kloop::kWarpgroupM];  // scale_a * scale_w
  float amax[kSplitBlocks][kloop::kWarpgroupM];  // of each quarter of the columns
  u64 full[kSplitBlocks];
};

// v_up_shared.cuh: the same 64 rows for all warpgroups, 32 columns each.
struct SharedRowsStorage {
  alignas(1024) u8 w_uv[kSplitBlocks][kloop::kTileN * kloop::kTileK];
  alignas(1024) u8 rows[2][kSplitBlocks][kloop::kWarpgroupM * kloop::kTileK];  // e4m3, 128-byte swizzle, in turn
  float scale[2][kSplitBlocks][kloop::kWarpgroupM];
  float amax[2][kSplitBlocks][kloop::kWarpgroupM];  // of each quarter of the columns
  u64 full[kSplitBlocks];
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

}  // namespace mla_fp8::v_up
