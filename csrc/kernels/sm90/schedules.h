// The schedules of a product on Hopper, composed of a row source and a store: what the tile table,
// the launcher and the kernels know of each. Their tiles, threads and shared memory are defined
// here, their steps in few.cuh, shared.cuh, own.cuh, pipelined.cuh and kloop.cuh.
//
//   FewRows     few rows: weights are wgmma's A and the rows its B (swap AB), so that 8 to 32 rows
//               waste nothing
//   SharedRows  rows are split once, in shared memory, for all warpgroups of a CTA
//   OwnRows     each warpgroup has rows of its own, split on the way to registers; in phases, all
//               CTAs read, then all write
//   Pipelined   rows are brought, split and multiplied at the same time, by different warpgroups
//   KLoop       any k: rows go to registers, and weights through a ring of stages, which keeps them
//               if all of k fits
//
// A row source says how 128 columns of a row become e4m3 terms and a scale; a store, what becomes
// of the sums.
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

// Row sources. kMostTerms is the number of e4m3 terms a value of which there is room for. Room is
// left for one more source: Combined (split-KV partials).
template <int kMostTerms_>
struct Terms {  // 16-bit rows, as product.terms terms in 1x128 groups (docs/numerics.md)
  static constexpr int kInBytes = 2, kMostTerms = kMostTerms_;
};
struct Taken {  // e4m3 rows with their scales
  static constexpr int kInBytes = 1, kMostTerms = 1;
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
  static constexpr int kMostTerms = Rows::kMostTerms;
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
  static constexpr int kPlaneBytes = kTokens * kK;  // the rows' terms of one rank
  static_assert(kTokens % kRowsAtOnce == 0 || kTokens < kRowsAtOnce);
  static_assert(kBlocks <= kWarpgroupWarps);  // a warp starts one block's copy

  struct Shared {
    // In the 128-byte swizzle, which repeats every 1024 bytes.
    alignas(1024) u8 w[kWarpgroups_][kBlocks][kTiles][kWgmmaM * kGroup];
    alignas(1024) u8 rows[Rows::kMostTerms][kBlocks][kTokens * kGroup];  // e4m3, likewise
    float scale[kBlocks][kTokens];
    float amax[Store::kRowScale ? Base::kThreads / kWarp : 1][kTokens];  // of each warp's columns
    float multiplier[kTokens];
    u64 full[kWarpgroups_][kBlocks];
  };
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
};

// 64 rows for all warpgroups, each of which makes kChunks times 128 of their columns; k is 128.
// kAhead is the number of stages of shared memory through which the next rows come, or 0 where they
// come through registers. There is room for kPlanes planes of terms.
template <class Rows, class Store, int kWarpgroups_, int kChunks_, int kAhead_, int kPlanes_>
struct SharedRows : Schedule<Rows, Store, kWarpgroups_> {
  using Base = Schedule<Rows, Store, kWarpgroups_>;
  static constexpr int kChunks = kChunks_, kAhead = kAhead_, kPlanes = kPlanes_, kBlocks = 1;
  static constexpr int kTileM = kWgmmaM;
  static constexpr int kTileN = kWarpgroups_ * kChunks * kChunkN;
  static constexpr int kK = kGroup;
  static constexpr int kStages = kTileN / kChunkN;
  static constexpr int kUnderWay = kAhead == 0 ? 1 : kAhead;  // row tiles
  static constexpr bool kLeavesRoom = true;
  static constexpr WeightOrder kOrder = lane_order(Base::kLaneColumns);

  // Rows that all threads bring at once; rows of a thread; its chunks of q_pe, where that has 64
  // columns and n is 512.
  static constexpr int kSlotRows = Base::kThreads / kParts, kSlots = kTileM / kSlotRows;
  static constexpr int kPeSlots = kTileN / Base::kThreads > 1 ? kTileN / Base::kThreads : 1;
  static constexpr int kPlaneBytes = kTileM * kGroup;
  static_assert(kTileM % kSlotRows == 0 && kStages <= Base::kThreads / kWarp && kPlanes >= Rows::kMostTerms);

  struct Shared {
    alignas(1024) u8 w[kStages][kWeightTileBytes];  // 128-byte swizzle
    alignas(1024) u8 planes[kPlanes][kPlaneBytes];  // likewise
    alignas(16)
        u8 ahead[kAhead == 0 ? 1 : kAhead][kAhead == 0 ? 1 : kSlots][2][kAhead == 0 ? 1 : Base::kThreads][kVectorBytes];
    float scale[2][kTileM];
    u64 full[kStages];
  };
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
};

// 64 rows a warpgroup, through kRowStages stages of its own, and kChunks times 128 columns; k is
// 128. kPhased is 1 or 0.
template <class Rows, class Store, int kWarpgroups_, int kChunks_, int kRowStages_, int kPhased_>
struct OwnRows : Schedule<Rows, Store, kWarpgroups_> {
  using Base = Schedule<Rows, Store, kWarpgroups_>;
  static constexpr int kChunks = kChunks_, kRowStages = kRowStages_, kBlocks = 1;
  static constexpr int kTileM = kWarpgroups_ * kWgmmaM;
  static constexpr int kTileN = kChunks * kChunkN;
  static constexpr int kK = kGroup;
  static constexpr int kStages = kChunks;
  static constexpr bool kPhased = kPhased_ != 0;
  static constexpr WeightOrder kOrder = lane_order(Base::kLaneColumns);
  static_assert(kStages <= Base::kThreads / kWarp);

  // A stage: 64 rows, and where there is any their q_pe of 64 columns.
  static constexpr int kRowsBytes = 2 * kWgmmaM * kGroup, kPeBytes = 2 * kWgmmaM * 64;
  static constexpr int kPeSlots = kPeBytes / (kWarpgroup * kVectorBytes);  // chunks of a thread
  static constexpr int kStagesWithPe = kRowStages * kRowsBytes / (kRowsBytes + kPeBytes);

  struct Shared {
    alignas(1024) u8 w[kStages][kWeightTileBytes];  // 128-byte swizzle
    alignas(16) u8 rows[kWarpgroups_][kRowStages * kRowsBytes];
    u64 full[kStages];
  };
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
};

// 64 rows and 128 columns; k is kBlocks groups. kSplitters_ warpgroups split the rows for one that
// multiplies, through kRowStages stages of rows and kPlaneStages of planes.
template <class Rows, class Store, int kSplitters_, int kBlocks_, int kRowStages_, int kPlaneStages_>
struct Pipelined : Schedule<Rows, Store, kSplitters_ + 1> {
  using Base = Schedule<Rows, Store, kSplitters_ + 1>;
  static constexpr int kBlocks = kBlocks_, kRowStages = kRowStages_, kPlaneStages = kPlaneStages_;
  static constexpr int kTileM = kWgmmaM;
  static constexpr int kTileN = kChunkN;
  static constexpr int kK = kBlocks * kGroup;
  static constexpr int kStages = kBlocks;
  static constexpr WeightOrder kOrder = lane_order(Base::kLaneColumns);
  static constexpr int kSplitters = kSplitters_ * kWarpgroup;  // threads
  // Rows at once, and of a thread.
  static constexpr int kSlotRows = kSplitters / kParts, kSlots = kTileM / kSlotRows;
  static constexpr int kPlaneBytes = kTileM * kGroup;
  static_assert(kTileM % kSlotRows == 0 && kStages <= Base::kThreads / kWarp);
  static_assert(2 * kPlaneStages < 16);  // barriers of a CTA

  // Registers a thread: what a launch gives to all, and what the multiplier then gets from the
  // splitters.
  static constexpr int kRegisters = kRegistersPerSm / Base::kThreads / kRegisterStep * kRegisterStep;
  static constexpr int kSplitterRegisters = 112;
  static constexpr int kLeftRegisters = kRegisters + (kRegisters - kSplitterRegisters) * kSplitters_;
  static constexpr int kMultiplierRegisters = kLeftRegisters < 240 ? kLeftRegisters : 240;

  struct Shared {
    alignas(1024) u8 w[kStages][kWeightTileBytes];  // 128-byte swizzle
    alignas(1024) u8 planes[kPlaneStages][Rows::kMostTerms][kPlaneBytes];  // likewise
    alignas(16) u8 rows[kRowStages][kSlots][2][kSplitters][kVectorBytes];
    float scale[kPlaneStages][kTileM];
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
