// Any CPU with a C++17 compiler: 128-bit vectors by the compiler's vector extension (SSE2, NEON, or
// scalars).
#include "cpu/gemm.h"
#include "cpu/tile.h"

namespace mla_fp8::cpu {
namespace {

struct Portable {
  typedef float Reg __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kRowTile = 2;
  static constexpr int kNarrowRows = 2;
  static constexpr int kPanelRegs = 4;

  MLA_FP8_INLINE Reg load(const float* x) {
    Reg v;
    std::memcpy(&v, x, sizeof v);
    return v;
  }
  MLA_FP8_INLINE void store(float* x, Reg v) { std::memcpy(x, &v, sizeof v); }
  MLA_FP8_INLINE Reg broadcast(float x) { return Reg{x, x, x, x}; }
  MLA_FP8_INLINE Reg add_product(Reg a, Reg b, Reg c) { return a * b + c; }
  MLA_FP8_INLINE Reg fused_multiply_add(Reg a, Reg b, Reg c) {
    for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
  }

  struct WidePanel {
    using Value = float;
    MLA_FP8_INLINE Reg load(const float* panel, int64_t i) { return Portable::load(panel + i * kLanes); }
    MLA_FP8_INLINE void decode(const uint8_t* w, int64_t n_stride, const Ahead& /*ahead*/, float* panel) {
      constexpr int64_t kWidth = kPanelRegs * kLanes;
      for (int64_t n = 0; n < kWidth; ++n) {
        float column[kScaleGroup];
        load_row(w + n * n_stride, Dtype::kE4m3, kScaleGroup, column);
        for (int64_t k = 0; k < kScaleGroup; ++k) panel[k * kWidth + n] = column[k] * (1.0f / kActivationLift);
      }
    }
  };
  using NarrowPanel = WidePanel;
};

}  // namespace

const Kernels& portable_kernels() {
  static constexpr Kernels kernels = {"portable", run_tile<Portable>, quantize_rows};
  return kernels;
}

}  // namespace mla_fp8::cpu
