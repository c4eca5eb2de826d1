// 1. q_val[h,m,:] = e4m3(q_nope[m,h,:] * (1 / q_scale)), where for each group g of 128 columns
//    q_scale[h,m,g] = max(amax of |q_nope[m,h,g]|, amax_floor) / 448
//
// 2. Tensors   q_nope   [S,H,K]      bf16 or fp16, any s and h stride; pointer and strides aligned
//                                    to the tile's load
//              q_val    [H,M,K]      e4m3, any h and m stride; 8-byte aligned for the aligned tile
//              q_scale  [H,M,K/128]  fp32, any strides (the op allocates it M-contiguous)
//              K is a multiple of 128, and S <= M. Rows from S on of both outputs are zeros;
//              without zero_pad, M is S here.
//
// 3. Grid      One CTA makes 32 rows of one (head, group). Neighbouring CTAs read neighbouring
//              groups of the same rows, so the strided reads of all CTAs in flight cover whole
//              tokens. Past 2^31 - 1 tiles a CTA takes several. Where all rows are fewer than a
//              tile has, a CTA has no more warps than they need.
//
// 4. Warps     Up to 8, all alike, 4 rows each. 8 lanes hold a row's group as 2 x 8 elements a lane
//              (8 l.. and 64 + 8 l..), so that each load of a warp is 4 x 128 contiguous bytes and
//              each store 4 x 64. At most 32 registers: 8 CTAs fill an SM and have 64 KB in flight,
//              4 times what latency x bandwidth asks for.
//
// 5. Pipeline  None inside a CTA; the CTAs of an SM overlap. Which tile is whose is worked out
//              before griddepcontrol.wait, which precedes every access to memory.
//
// 6. Shared memory  None.
//
// 7. Cost      Reads 2 S H K bytes and writes M H K (1 + 4 / 128), with about 4 operations an
//              element. Bound by memory.
//
// 8. Numerics  The amax is exact, both divisions are IEEE, the product rounds once to fp32 and
//              once, to nearest even, to e4m3. A zero group has scale amax_floor / 448 and zeros. A
//              NaN makes its group's scale and values NaN; an Inf makes the scale Inf, finite
//              values zeros and Infs NaN. No other group sees it.
#pragma once

#include "kernels/grid.cuh"
#include "kernels/numbers.cuh"
#include "kernels/ptx/convert.cuh"
#include "kernels/quantize_q_nope.h"

namespace mla_fp8::quantize_q_nope {

inline constexpr int kVectors = 2;  // a lane's share of a group
inline constexpr int kVectorStep = kScaleGroup / kVectors;  // elements between them
inline constexpr int kVectorElements = kVectorStep / kLanesPerGroup;
inline constexpr int kVectorWords = kVectorElements / 2;
static_assert(kVectorElements * kElementBytes == kLoadBytes && kVectorElements == kStoreBytes);

// 8 elements of one row, two a word.
template <class Config>
MLA_FP8_DEVICE void load(u32* word, const u16* from) {
  if constexpr (Config::kAligned) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    word[0] = words.x, word[1] = words.y, word[2] = words.z, word[3] = words.w;
  } else {
#pragma unroll
    for (int i = 0; i < kVectorWords; ++i) word[i] = from[2 * i] | static_cast<u32>(from[2 * i + 1]) << 16;
  }
}

// 8 e4m3, four a word.
template <class Config>
MLA_FP8_DEVICE void store(u8* to, u32 low, u32 high) {
  if constexpr (Config::kAligned) {
    *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[i] = static_cast<u8>(low >> 8 * i);
      to[i + 4] = static_cast<u8>(high >> 8 * i);
    }
  }
}

// One lane's part of one row's group.
template <class Config, class Element>
MLA_FP8_DEVICE void quantize(const Params& p, i64 row, i64 head, u32 group) {
  const int lane = threadIdx.x % kLanesPerGroup;
  const i64 column = static_cast<i64>(group) * kScaleGroup + lane * kVectorElements;
  u32 words[kVectors * kVectorWords] = {};
  if (row < p.s) {
    const u16* from = static_cast<const u16*>(p.q_nope) + row * p.q_nope_stride[0] + head * p.q_nope_stride[1] + column;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) load<Config>(words + v * kVectorWords, from + v * kVectorStep);
  }
  const float amax = Element::low(amax_bits<kLanesPerGroup>(words));
  const float scale = __fdiv_rn(ptx::max_nan_f32(amax, p.amax_floor), kE4m3Max);
  const float multiplier = __frcp_rn(scale);
  if (row >= p.rows) return;

  u8* to = p.q_val + head * p.q_val_stride[0] + row * p.q_val_stride[1] + column;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const u32* word = words + v * kVectorWords;
    store<Config>(to + v * kVectorStep, e4m3x4_scaled<Element>(word[0], word[1], multiplier),
                  e4m3x4_scaled<Element>(word[2], word[3], multiplier));
  }
  if (lane == 0) {
    p.q_scale[head * p.q_scale_stride[0] + row * p.q_scale_stride[1] + group * p.q_scale_stride[2]] =
        row < p.s ? scale : 0;
  }
}

template <class Config>
MLA_FP8_DEVICE void run(const Params& p) {
  for (i64 tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    // 32-bit division where it is enough: the 64-bit one takes as long as the rest of a row.
    const u64 columns = p.columns;
    const bool narrow = ((static_cast<u64>(tile) | columns) >> 32) == 0;
    const u64 row_tile = narrow ? static_cast<u32>(tile) / static_cast<u32>(columns) : static_cast<u64>(tile) / columns;
    const u64 column = static_cast<u64>(tile) - row_tile * columns;
    const u64 head = narrow ? static_cast<u32>(column) / p.groups : column / p.groups;
    const u32 group = static_cast<u32>(column - head * p.groups);
    const i64 row = static_cast<i64>(row_tile) * kTileM + threadIdx.x / kLanesPerGroup;
    wait_for_predecessors();  // of further tiles: at once
    if (p.is_fp16) {
      quantize<Config, Fp16>(p, row, static_cast<i64>(head), group);
    } else {
      quantize<Config, Bf16>(p, row, static_cast<i64>(head), group);
    }
  }
}

}  // namespace mla_fp8::quantize_q_nope
