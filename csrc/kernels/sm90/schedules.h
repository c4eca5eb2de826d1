// The schedules of a product on Hopper, composed of a row source and a store: what the tile table,
// the launcher and the kernels know of each. Their tiles, threads and shared memory are defined
// here, their steps in few.cuh, shared.cuh and kloop.cuh.
//
//   FewRows     few rows: weights are wgmma's A and the rows its B (swap AB), so that 8 to 32 rows
//               waste nothing
//   SharedRows  rows are brought to shared memory once for all warpgroups of a CTA; in phases, all
//               CTAs read, then all write
//   KLoop       any k: rows go to registers, and weights through a ring of stages, which keeps them
//               if all of k fits
//
// A row source says how 128 columns of a row become e4m3 and a scale; a store, what becomes of the
// sums.
#pragma once

#include "kernels/sm90/weight_order.h"

namespace mla_fp8::sm90 {

inline constexpr int kWarp = 32;
inline constexpr int kWarpgroup = kWarp * kWarpgroupWarps;  // threads
// Of k: one scale, and 128 bytes of e4m3, which is the swizzle's width.
inline constexpr int kGroup = kScaleGroup;
inline constexpr int kChunkN = kScaleGroup;  // of n: one row of scale blocks
inline constexpr int kWeightTileBytes = kChunkN * kGroup;
inline constexpr int kParts = 8;  // threads that quantize a row's group
inline constexpr int kMaxSharedBytes = 227 * 1024;  // of a CTA

// Row sources. Room is left for two more: TwoPlanes (16-bit rows as two e4m3 terms) and Combined
// (split-KV partials).
struct Quantize {  // 16-bit rows, quantized in 1x128 groups (docs/numerics.md)
  static constexpr int kInBytes = 2;
};
struct Taken {  // e4m3 rows with their scales
  static constexpr int kInBytes = 1;
};

// Stores. kOutBytes is the bytes of an output element, or 0 where the product's dtype says it at
// run time.
template <int kOutBytes_>
struct Latent {  // absorb_q: one dtype or one scale, q_pe copied beside
  static constexpr int kOutBytes = kOutBytes_;
  static constexpr bool kPe = true, kRowScale = false, kFp16 = true;
};
template <int kOutBytes_>
struct Value {  // v_up and v_up_quantized: one dtype, one scale, or a scale a row
  static constexpr int kOutBytes = kOutBytes_;
  static constexpr bool kPe = false, kRowScale = kOutBytes != 2, kFp16 = true;
};
struct Plain {  // bmm
  static constexpr int kOutBytes = 2;
  static constexpr bool kPe = false, kRowScale = false, kFp16 = false;
};

// What a schedule is unless it says otherwise.
template <class Rows_, class Store_, int kWarpgroups_>
struct Schedule {
  using Rows = Rows_;
  using Store = Store_;
  using Params = mla_fp8::Params;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kOutBytes = Store::kOutBytes;
  // Neighbouring columns that a lane stores at once: 16 bytes, or 8 where kOutBytes is 0 and out is
  // e4m3.
  static constexpr int kLaneColumns = kOutBytes == 1 ? 16 : 8;
  static constexpr int kAlignBytes = kVectorBytes;  // of activation pointers and strides
  static constexpr bool kPersistent = true;  // keeps its weights for all row tiles that it takes
  static constexpr bool kLeavesRoom = false;  // the next launch's CTAs fit beside its own
  static constexpr bool kPhased = false;  // reads and writes in turn
};

// kTokens rows; each warpgroup has kTiles tiles of 64 columns; k is kBlocks groups.
template <class Rows, class Store, int kTokens, int kWarpgroups_, int kTiles_, int kBlocks_>
struct FewRows : Schedule<Rows, Store, kWarpgroups_> {
  using Base = Schedule<Rows, Store, kWarpgroups_>;
  static constexpr int kTiles = kTiles_, kBlocks = kBlocks_;
  static constexpr int kWarpgroupN = kTiles * kWgmmaM;
  static constexpr int kTileM = kTokens;
  static constexpr int kTileN = kWarpgroups_ * kWarpgroupN;
  static constexpr int kK = kBlocks * kGroup;
  static constexpr int kStages = kTileN / kChunkN * kBlocks;  // weight tiles of 128 x 128 that stay
  static constexpr int kLaneColumns = 2 * kTiles;
  static constexpr bool kLeavesRoom = true;
  static constexpr WeightOrder kOrder = swap_ab_order(kTiles);

  static constexpr int kRowLanes = kBlocks * kParts;  // threads that hold a row
  static constexpr int kRowsAtOnce = Base::kThreads / kRowLanes;
  static constexpr int kSlots = (kTokens + kRowsAtOnce - 1) / kRowsAtOnce;  // rows of a thread
  static_assert(kTokens % kRowsAtOnce == 0 || kTokens < kRowsAtOnce);
  static_assert(kBlocks <= kWarpgroupWarps);  // a warp starts one block's copy

  struct Shared {
    // In the 128-byte swizzle, which repeats every 1024 bytes.
    alignas(1024) u8 w[kWarpgroups_][kBlocks][kTiles][kWgmmaM * kGroup];
    alignas(1024) u8 rows[kBlocks][kTokens * kGroup];  // e4m3, likewise
    float scale[kBlocks][kTokens];
    float amax[Store::kRowScale ? Base::kThreads / kWarp : 1][kTokens];  // of each warp's columns
    float multiplier[kTokens];
    u64 full[kWarpgroups_][kBlocks];
  };
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
};

// 64 rows for all warpgroups, each of which makes kChunks times kColumns of their columns; k is
// kBlocks groups. kAhead is the number of stages of shared memory through which the next rows come,
// or 0 where they come through registers. kPhased is 1 or 0.
template <class Rows, class Store, int kWarpgroups_, int kChunks_, int kColumns_, int kBlocks_, int kAhead_,
          int kPhased_ = 0>
struct SharedRows : Schedule<Rows, Store, kWarpgroups_> {
  using Base = Schedule<Rows, Store, kWarpgroups_>;
  static constexpr int kChunks = kChunks_, kColumns = kColumns_, kBlocks = kBlocks_, kAhead = kAhead_;
  static constexpr int kTileM = kWgmmaM;
  static constexpr int kTileN = kWarpgroups_ * kChunks * kColumns;
  static constexpr int kK = kBlocks * kGroup;
  static constexpr int kStages = kTileN / kChunkN * kBlocks;
  static constexpr int kUnderWay = kAhead == 0 ? 1 : kAhead;  // row tiles
  static constexpr bool kLeavesRoom = !kPhased_ && kBlocks == 1;
  static constexpr bool kPhased = kPhased_ != 0;
  static constexpr WeightOrder kOrder = lane_order(Base::kLaneColumns);

  // Rows of a block that all threads bring at once.
  static constexpr int kSlotRows = Base::kThreads / kParts;
  static constexpr int kSlots = kTileM * kBlocks / kSlotRows;  // of a thread
  static_assert(kTileM % kSlotRows == 0 && kChunkN % kColumns == 0 && kStages <= Base::kThreads / kWarp);

  // What is kept of a row tile: the e4m3 rows, their scales, and in phases q_pe as it will be
  // stored, 8 columns a thread.
  static constexpr int kRowsBytes = kTileM * kK, kScaleBytes = kTileM * kBlocks * 4;
  // Chunks of q_pe that a thread copies where q_pe has 64 columns and n is 512.
  static constexpr int kPeSlots = kTileN / Base::kThreads > 1 ? kTileN / Base::kThreads : 1;
  static constexpr int kPeWords = !kPhased ? 0 : Base::kOutBytes == 1 ? 2 : 4;  // of a thread
  static constexpr int kPeBytes = 4 * kPeWords * Base::kThreads;
  static constexpr int kWithoutPe = kRowsBytes + kScaleBytes;
  // Two row tiles, or in phases all that the rest of Shared leaves.
  static constexpr int kTilesBytes = kPhased ? 114 * 1024 : 2 * kWithoutPe;
  static constexpr int kBuffers = kTilesBytes / kWithoutPe, kBuffersWithPe = kTilesBytes / (kWithoutPe + kPeBytes);

  struct Shared {
    // Tiles of 128 x 128, block by block for each 128 columns; 128-byte swizzle.
    alignas(1024) u8 w[kStages][kWeightTileBytes];
    // The rows of every kept tile, 128-byte swizzle; then their scales; then their q_pe.
    alignas(1024) u8 tiles[kTilesBytes];
    alignas(16)
        u8 ahead[kAhead == 0 ? 1 : kAhead][kAhead == 0 ? 1 : kSlots][2][kAhead == 0 ? 1 : Base::kThreads][kVectorBytes];
    alignas(16) u8 pe_ahead[kPhased ? kAhead : 1][kPhased ? Base::kThreads : 1][kVectorBytes];
    // Of each warpgroup's columns.
    float amax[2][Store::kRowScale ? kWarpgroups_ : 1][Store::kRowScale ? kTileM : 1];
    u64 full[kStages];
  };
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
};

// 64 rows a warpgroup and 128 columns; kStages weight tiles. kOnlyK is the only k that it takes, or
// 0 for any multiple of 128.
template <class Rows, class Store, int kWarpgroups_, int kStages_, int kAlignBytes_, int kOnlyK = 0>
struct KLoop : Schedule<Rows, Store, kWarpgroups_> {
  using Base = Schedule<Rows, Store, kWarpgroups_>;
  static constexpr int kTileM = kWarpgroups_ * kWgmmaM;
  static constexpr int kTileN = kChunkN;
  static constexpr int kK = kOnlyK, kBlocks = kOnlyK / kGroup;
  static constexpr int kStages = kStages_;
  static constexpr int kAlignBytes = kAlignBytes_;
  static constexpr bool kAligned = kAlignBytes == kVectorBytes;
  static constexpr bool kStaged = kAligned && kStages > 1;  // the next rows wait in shared memory
  static constexpr bool kPersistent = kStages > 1;
  static constexpr WeightOrder kOrder = lane_order(Base::kLaneColumns);
  static_assert(kBlocks <= kStages);

  // A warpgroup's 64 x 128 rows as 16-byte vectors, and their scales if they come with any. No
  // other warp reads them.
  struct Stage {
    static constexpr int kThreads = kStaged ? kWarpgroup : 1;
    alignas(16) u8 vector[Rows::kInBytes * kGroup * kWgmmaM / kWarpgroup / kVectorBytes][kThreads][kVectorBytes];
    float scale[Rows::kInBytes == 1 ? 2 : 1][Rows::kInBytes == 1 ? kThreads : 1];
  };
  struct Shared {
    alignas(1024) u8 w[kStages][kWeightTileBytes];
    Stage stage[kStaged ? kStages : 1][kStaged ? kWarpgroups_ : 1];
    u64 full[kStages];
    u64 empty[kStages];
  };
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
};

}  // namespace mla_fp8::sm90
