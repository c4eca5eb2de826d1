// Rows on their way to shared memory, where wgmma reads them: split once for all warpgroups of a
// CTA, into planes of e4m3 terms.
//
// Eight threads hold a row's group of 128, 16 elements each: those from columns 8 t and 64 + 8 t
// on, 8 each. The tile is [rows][128] e4m3 under the 128-byte swizzle, as the weights are. Rows
// past the end are zeros.
#pragma once

#include "kernels/numbers.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/memory.cuh"
#include "kernels/sm90/schedules.h"

namespace mla_fp8::sm90 {

inline constexpr int kHalf = kGroup / 2;

// A thread's share of a row's group: 16-bit elements, two a word.
struct RowPart {
  u32 word[8];
};

// `from` is the group's first element; it is read only where the row exists.
MLA_FP8_DEVICE void load_part(RowPart& part, const u16* from, int lane, bool exists) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u32(&word)[4] = reinterpret_cast<u32(&)[4]>(part.word[4 * half]);
    if (exists) {
      ptx::ld_global_no_allocate_v4(word, from + half * kHalf + lane * 8);
    } else {
#pragma unroll
      for (u32& zero : word) zero = 0;
    }
  }
}

// The same, to the thread's own place in shared memory, as part of its open batch of copies. `from`
// must be readable even where the row does not exist.
template <int kThreads>
MLA_FP8_DEVICE void copy_part(u8 (&to)[2][kThreads][kVectorBytes], const u16* from, int lane, bool exists) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    ptx::cp_async_cg_16(to[half][threadIdx.x], from + half * kHalf + lane * 8, exists ? kVectorBytes : 0);
  }
}
template <int kThreads>
MLA_FP8_DEVICE void take_part(RowPart& part, const u8 (&from)[2][kThreads][kVectorBytes]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load_words(reinterpret_cast<u32(&)[4]>(part.word[4 * half]), from[half][threadIdx.x]);
  }
}

// The row's terms go to the planes of `tile`, kPlaneBytes apart, its scale to `scale`. All lanes of
// a warp call it.
template <class S, int kPlaneBytes>
MLA_FP8_DEVICE void split_part(u8* tile, float* scale, const RowPart& part, int row, int lane) {
  u32 term[S::kTerms][4];
  const float row_scale = split<S>(part.word, amax_bits<kParts>(part.word), term);
#pragma unroll
  for (int t = 0; t < S::kTerms; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int chunk = half * kHalf / kVectorBytes + lane / 2;  // of 16 bytes
      u8* to = tile + t * kPlaneBytes + row * kGroup + (chunk ^ row % 8) * kVectorBytes + lane % 2 * 8;
      *reinterpret_cast<uint2*>(to) = make_uint2(term[t][2 * half], term[t][2 * half + 1]);
    }
  }
  if (lane == 0) *scale = row_scale;
}

}  // namespace mla_fp8::sm90
