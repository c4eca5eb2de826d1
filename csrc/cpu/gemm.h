// One problem serves bmm, absorb_q, v_up and v_up_quantized:
//     out[s,h,:] = sum over k-blocks p of (a[s,h,p] . w[h,:,p]^T) * (a_scale[s,h,p] * w_scale[h,:,p])
// where a is e4m3 with given scales, or bf16/fp16 that is quantized in 1x128 groups on the way in.
#pragma once

#include <cstdint>

#include "args.h"

namespace mla_fp8::cpu {

struct Gemm {
  const void* a;              // [H,S,K]
  int64_t a_stride[2];        // h, s
  Dtype a_dtype;              // bf16, fp16 or e4m3
  const float* a_scale;       // [H,S,K/128], only with e4m3
  int64_t a_scale_stride[3];  // h, s, k / 128
  const uint8_t* w;           // [H,N,K] e4m3
  int64_t w_stride[2];        // h, n
  const float* w_scale;       // [H,N/128,K/128]
  int64_t w_scale_stride[3];  // h, n / 128, k / 128
  void* out;                  // [H,S,N+P] bf16, fp16 or e4m3
  int64_t out_stride[2];      // h, s
  Dtype out_dtype;
  const float* out_scale;     // e4m3 with this one scale, or
  float* group_scale;         // [H,S]: e4m3 with a scale for each row of N = 128 values
  int64_t group_scale_stride[2];  // h, s
  const void* pe;             // [H,S,P], dtype of a; null where P = 0
  int64_t pe_stride[2];       // h, s
  int64_t heads, rows, n, k, p;
};

inline constexpr int64_t kScratchRows = 132;     // a multiple of every instruction set's row tile
inline constexpr int64_t kMaxBlocks = 4;     // k-blocks of the rows that are kept at once: all of o_latent's
inline constexpr int64_t kMaxColumns = 512;  // one head of W_UK
inline constexpr int64_t kMinColumns = 64;   // a multiple of every instruction set's panel width
inline constexpr float kActivationLift = 256.0f;  // an e4m3 code moved into an fp16 reads as its value / 256

// Rows [row_begin, row_end) and columns [n_begin, n_end) of one head.
struct TileRange {
  int64_t head, row_begin, row_end, n_begin, n_end;
};

// What one thread works in: 264 KiB + 32 KiB + 264 KiB. The panel stays in L1, what a tile uses of the rest in L2.
struct alignas(64) Scratch {
  float a[kMaxBlocks * kScratchRows * kScaleGroup];  // k-blocks of the rows: e4m3 values * kActivationLift in fp32
  float panel[kScaleGroup * kMinColumns];        // a k-block of some columns, [k][column]: weights / kActivationLift
  float acc[kScratchRows * kMaxColumns];
  float a_scale[kMaxBlocks * kScratchRows];
};

// What each instruction set provides.
struct Kernels {
  const char* name;
  void (*run_tile)(const Gemm& gemm, const TileRange& range, Scratch& scratch);
  void (*quantize_rows)(const QuantizeArgs& args, int64_t head, int64_t row_begin, int64_t row_end);
};

const Kernels& portable_kernels();
const Kernels* avx2_kernels();    // null where this build's target is not x86-64
const Kernels* avx512_kernels();
const Kernels& best_kernels();    // for the machine this runs on, chosen once

}  // namespace mla_fp8::cpu
