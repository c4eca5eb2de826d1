// One symbol a line of the tile table.
#include "config/tiles.h"
#include "kernels/quantize_q_nope.cuh"

namespace q = mla_fp8::quantize_q_nope;

#define MLA_FP8_KERNEL(symbol, align, ctas)                                                                          \
  extern "C" __global__ void __launch_bounds__(q::kThreads, ctas) symbol(const __grid_constant__ q::Params params) { \
    q::run<q::Config<align>>(params);                                                                                \
  }
MLA_FP8_QUANTIZE_Q_NOPE_TILES(MLA_FP8_KERNEL)
#undef MLA_FP8_KERNEL
