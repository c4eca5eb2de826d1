// The limits and constants of the ops, each once, for bindings, config, CPU code and kernels. NVRTC
// compiles this too.
#pragma once

#include "types.h"

namespace mla_fp8 {

// DeepSeek-V3's scales: a 1x128 group of activations, or a 128x128 block of weights, shares one. n
// and k are multiples of kScaleGroup.
inline constexpr int kScaleGroup = 128;
inline constexpr float kE4m3Max = 448.0f;  // the largest e4m3 value
// e4m3 terms that hold a value of bf16 and of fp16.
inline constexpr int kBf16Terms = 2, kMostTerms = 3;
// Of absorb_q, v_up and v_up_quantized (docs/numerics.md).
inline constexpr float kAmaxFloor = 1e-4f;
// The widest access. Activations are aligned to it where a tile uses it.
inline constexpr int kVectorBytes = 16;
inline constexpr i64 kMaxExtent = 16384;  // of n and k: tests go through the tile tables up to here
// Columns of q_pe, which are a multiple of kPeStep: one 16-byte store of e4m3.
inline constexpr i64 kMaxPe = 256;
inline constexpr i64 kPeStep = 16;
inline constexpr i64 kMaxRows = 2147483647;  // tokens, and rows of a head: they fit 32 bits
// Of the weights' address and strides: what a tensor map takes.
inline constexpr int kWeightAlignBytes = 16;
// The ops allocate scales in multiples of this many rows: 16 bytes of fp32.
inline constexpr int kScaleRowsMultiple = 4;

}  // namespace mla_fp8
