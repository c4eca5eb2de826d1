// Activations quantized once for a whole CTA: into shared memory, where wgmma reads them.
//
// Eight threads hold a row's group of 128, 16 elements each: columns 8 t.. and 64 + 8 t... The A tile is [64][128] e4m3 under the 128-byte swizzle,
// as the weights are. Rows past the end are zeros.
#pragma once

#include "kernels/ptx/cp_async.cuh"
#include "kernels/weights.cuh"

namespace mla_fp8::shared_rows {

inline constexpr int kRows = 64;  // of one wgmma
inline constexpr int kTileBytes = kRows * kGroup;
inline constexpr int kHalf = kGroup / 2;

// A thread's share of a row's group.
struct Raw {
  u32 word[2][4];
};

MLA_FP8_DEVICE void load(Raw& raw, const u16* row_from, int part, bool exists) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (exists) {
      ptx::ld_global_no_allocate_v4(raw.word[half], row_from + half * kHalf + part * 8);
    } else {
#pragma unroll
      for (u32& word : raw.word[half]) word = 0;
    }
  }
}

// The same to the thread's own place in shared memory, in its open batch of copies. `row_from` may be read in any case.
template <int kThreads>
MLA_FP8_DEVICE void copy(u8 (&to)[2][kThreads][kVectorBytes], const u16* row_from, int part, bool exists) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    ptx::cp_async_cg_16(to[half][threadIdx.x], row_from + half * kHalf + part * 8, exists ? kVectorBytes : 0);
  }
}
template <int kThreads>
MLA_FP8_DEVICE void take(Raw& raw, const u8 (&from)[2][kThreads][kVectorBytes]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) load_shared(raw.word[half], from[half][threadIdx.x]);
}

template <class Element>
MLA_FP8_DEVICE float quantize_as(const Raw& raw, u32 amax_bits, u32 (&packed)[2][2]) {
  const float scale = group_scale(Element::low(amax_bits));
  const float multiplier = group_multiplier(scale);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    packed[half][0] = e4m3x4_scaled<Element>(raw.word[half][0], raw.word[half][1], multiplier);
    packed[half][1] = e4m3x4_scaled<Element>(raw.word[half][2], raw.word[half][3], multiplier);
  }
  return scale;
}

// The 1x128 quantization of docs/numerics.md: the row's values to `tile`, its scale to scales[row]. All lanes of a warp call it.
template <class Element>
MLA_FP8_DEVICE void quantize_row(u8* tile, float* scales, const Raw& raw, int row, int part) {
  u32 amax = 0;
#pragma unroll
  for (const auto& half : raw.word) {
#pragma unroll
    for (u32 word : half) amax = ptx::max_u16x2(amax, word & kMagnitudes);
  }
#pragma unroll
  for (int lanes = 1; lanes < kParts; lanes *= 2) amax = ptx::max_u16x2(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
  amax = ptx::max_u16x2(amax, amax >> 16) & 0xffffu;
  u32 packed[2][2];
  const float scale = quantize_as<Element>(raw, amax, packed);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int chunk = half * kHalf / kVectorBytes + part / 2;  // of 16 bytes
    u8* to = tile + row * kGroup + (chunk ^ row % 8) * kVectorBytes + part % 2 * 8;
    *reinterpret_cast<uint2*>(to) = make_uint2(packed[half][0], packed[half][1]);
  }
  if (part == 0) scales[row] = scale;
}

// kSlots of them, kRowStep rows apart.
template <int kRowStep, int kSlots>
MLA_FP8_DEVICE void quantize(u8* tile, float* scales, const Raw (&raw)[kSlots], bool is_fp16, int row, int part) {
  if (is_fp16) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) quantize_row<Fp16>(tile, scales, raw[i], row + i * kRowStep, part);
  } else {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) quantize_row<Bf16>(tile, scales, raw[i], row + i * kRowStep, part);
  }
}

// From one step of wgmma's K to the next, in a tile's descriptor.
inline constexpr u64 kStepDescriptor = kWgmmaK >> 4;

// The rows of a CTA: a run of neighbouring row tiles of one head and column tile.
struct RowRun {
  i32 head, slice;
  i64 first, end;  // rows
};

MLA_FP8_DEVICE RowRun row_run_of(u32 heads, u32 slices, i64 s) {
  const u32 columns = heads * slices;
  const u32 column = blockIdx.x % columns;
  const i64 runs = gridDim.x / columns;
  const i64 row_tiles = (s + kRows - 1) / kRows;
  const i64 run = (row_tiles + runs - 1) / runs * kRows;
  const i64 first = blockIdx.x / columns * run;
  return {static_cast<i32>(column / slices), static_cast<i32>(column % slices), first,
          first + run < s ? first + run : s};
}

}  // namespace mla_fp8::shared_rows
