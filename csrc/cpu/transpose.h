// What the x86 weight decoders share. They take 16 columns at a time from [column][k] to
// [k][column], and e4m3 codes to the fp16 of value / 256.
#pragma once

#include "cpu/convert.h"
#include "cpu/gemm.h"

namespace mla_fp8::cpu {
namespace {

constexpr int kGroupColumns = 16;
constexpr int kTransposeSize = 8;  // 16-bit pairs of codes to a 128-bit lane, and registers

// An e4m3 code in the high byte of 16 bits, shifted right by one arithmetically and masked, is the
// fp16 of value / 256, subnormals included; only the NaN codes come out as numbers.
constexpr int16_t kE4m3AsFp16Mask = static_cast<int16_t>(0xbf80);
static_assert(kActivationLift == 1 << (kFp16Bias - kE4m3Bias));
constexpr uint16_t kFp16Nan = 0x7e00;

// Transposes 8 registers x 8 pairs in every 128-bit lane. With r a register's number and c a pair's
// number, a round takes the address bits (r2 r1 r0, c2 c1 c0) to (r1 r0 c2, c1 c0 r2), a rotation:
// three rounds swap r and c.
template <class Isa, class Reg>
MLA_FP8_INLINE void transpose_pairs(Reg (&x)[kTransposeSize]) {
#pragma GCC unroll 3
  for (int round = 0; round < 3; ++round) {
    Reg y[kTransposeSize];
#pragma GCC unroll 4
    for (int i = 0; i < kTransposeSize / 2; ++i) {
      y[2 * i] = Isa::unpack_low(x[i], x[i + kTransposeSize / 2]);
      y[2 * i + 1] = Isa::unpack_high(x[i], x[i + kTransposeSize / 2]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTransposeSize; ++i) x[i] = y[i];
  }
}

// Sets the panel's value to NaN wherever a code of w is one.
template <class Value>
MLA_FP8_INLINE void patch_nan(const uint8_t* w, int64_t n_stride, int64_t width, int64_t panel_width, Value nan,
                              Value* panel) {
  for (int64_t n = 0; n < width; ++n) {
    for (int64_t k = 0; k < kScaleGroup; ++k) {
      if ((w[n * n_stride + k] & kE4m3Nan) == kE4m3Nan) panel[k * panel_width + n] = nan;
    }
  }
}

}  // namespace
}  // namespace mla_fp8::cpu
