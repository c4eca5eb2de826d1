// What the CPU code is made of: tiles of a product, a thread's scratch, and what each instruction
// set provides.
#pragma once

#include <cstdint>

#include "product.h"
#include "quantize.h"

namespace mla_fp8::cpu {

inline constexpr int64_t kScratchRows = 132;  // a multiple of every instruction set's row tile
inline constexpr int64_t kPaddingRows = 16;   // what a row tile may read past the rows
inline constexpr int64_t kMaxBlocks = 4;      // k-blocks of rows kept at once: all of o_latent's
inline constexpr int64_t kMaxColumns = 512;   // one head of w_uk
inline constexpr int64_t kMinColumns = 64;    // a multiple of every instruction set's panel width
// An e4m3 code that is moved into an fp16 reads as its value / 256.
inline constexpr float kActivationLift = 256.0f;

// Rows [row_begin, row_end) and columns [n_begin, n_end) of one head.
struct TileRange {
  int64_t head, row_begin, row_end, n_begin, n_end;
};

// What one thread works in: 272 KiB + 32 KiB + 264 KiB. The panel stays in L1, and what a tile uses
// of the rest stays in L2.
struct alignas(64) Scratch {
  // k-blocks of the rows: e4m3 values or exact ones / a_scale, * kActivationLift, in fp32. With AMX
  // exact ones / a_scale, in bf16.
  float a[(kMaxBlocks * kScratchRows + kPaddingRows) * kScaleGroup];
  // A k-block of some columns, [k][column]: weights / kActivationLift. With AMX two, in bf16.
  float panel[kScaleGroup * kMinColumns];
  float acc[kScratchRows * kMaxColumns];
  float a_scale[kMaxBlocks * kScratchRows];
};

// What each instruction set provides.
struct Kernels {
  const char* name;
  void (*run_tile)(const Product& product, const TileRange& range, Scratch& scratch);
  void (*quantize_rows)(const QuantizeArgs& args, int64_t head, int64_t row_begin, int64_t row_end);
};

const Kernels& portable_kernels();
const Kernels* avx2_kernels();    // null where this build's target is not x86-64
const Kernels* avx512_kernels();
const Kernels* amx_kernels();
const Kernels& best_kernels();    // for the machine this runs on, chosen once

}  // namespace mla_fp8::cpu
