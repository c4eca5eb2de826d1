// One symbol a line of the tile table.
#include "config/tiles.h"
#include "kernels/bmm.cuh"

#define MLA_FP8_KERNEL(symbol, k, stages, warpgroups, out_bytes, align_bytes, ctas_per_sm, serial_us) \
  extern "C" __global__ void __launch_bounds__(warpgroups* mla_fp8::kloop::kWarpgroup, ctas_per_sm)   \
      symbol(const __grid_constant__ mla_fp8::bmm::Params params) {                                   \
    using Config = mla_fp8::kloop::Config<k, stages, warpgroups, 1, out_bytes, align_bytes>;          \
    extern __shared__ __align__(1024) mla_fp8::u8 shared_bytes[];                                     \
    mla_fp8::bmm::run<Config>(params, *reinterpret_cast<Config::Shared*>(shared_bytes));              \
  }
MLA_FP8_BMM_TILES(MLA_FP8_KERNEL)
#undef MLA_FP8_KERNEL
