// One symbol a line of the tile table.
#include "config/tiles.h"
#include "kernels/absorb_q.cuh"
#include "kernels/absorb_q_kloop.cuh"
#include "kernels/absorb_q_shared.cuh"

namespace aq = mla_fp8::absorb_q;

#define MLA_FP8_KERNEL(symbol, tile_n, warpgroups, out_bytes, align_bytes, ctas_per_sm, start_us) \
  extern "C" __global__ void __launch_bounds__(warpgroups* aq::kWarpgroup, ctas_per_sm)           \
      symbol(const __grid_constant__ aq::Params params) {                                         \
    using Config = aq::Config<tile_n, warpgroups, out_bytes, align_bytes>;                        \
    extern __shared__ __align__(1024) mla_fp8::u8 shared_bytes[];                                 \
    aq::run<Config>(params, *reinterpret_cast<Config::Shared*>(shared_bytes));                    \
  }
MLA_FP8_ABSORB_Q_TILES(MLA_FP8_KERNEL)
#undef MLA_FP8_KERNEL

#define MLA_FP8_KERNEL(symbol, k, stages, warpgroups, out_bytes, align_bytes, ctas_per_sm, serial_us) \
  extern "C" __global__ void __launch_bounds__(warpgroups* mla_fp8::kloop::kWarpgroup, ctas_per_sm)   \
      symbol(const __grid_constant__ aq::Params params) {                                             \
    using Config = mla_fp8::kloop::Config<k, stages, warpgroups, 2, out_bytes, align_bytes>;          \
    extern __shared__ __align__(1024) mla_fp8::u8 shared_bytes[];                                     \
    aq::run_kloop<Config>(params, *reinterpret_cast<Config::Shared*>(shared_bytes));                  \
  }
MLA_FP8_ABSORB_Q_KLOOP_TILES(MLA_FP8_KERNEL)
#undef MLA_FP8_KERNEL

#define MLA_FP8_KERNEL(symbol, warpgroups, out_bytes, ctas_per_sm)                      \
  extern "C" __global__ void __launch_bounds__(warpgroups* aq::kWarpgroup, ctas_per_sm) \
      symbol(const __grid_constant__ aq::Params params) {                               \
    using Config = aq::SharedConfig<warpgroups, out_bytes>;                             \
    extern __shared__ __align__(1024) mla_fp8::u8 shared_bytes[];                       \
    aq::run_shared<Config>(params, *reinterpret_cast<Config::Shared*>(shared_bytes));   \
  }
MLA_FP8_ABSORB_Q_SHARED_TILES(MLA_FP8_KERNEL)
#undef MLA_FP8_KERNEL
