// One symbol a line of the tile table.
#include "config/tiles.h"
#include "kernels/absorb_q.cuh"
#include "kernels/absorb_q_few.cuh"
#include "kernels/absorb_q_kloop.cuh"
#include "kernels/absorb_q_phased.cuh"
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

#define MLA_FP8_KERNEL(symbol, warpgroups, chunks, out_bytes, ctas_per_sm, start_us)    \
  extern "C" __global__ void __launch_bounds__(warpgroups* aq::kWarpgroup, ctas_per_sm) \
      symbol(const __grid_constant__ aq::Params params) {                               \
    using Config = aq::SharedConfig<warpgroups, chunks, out_bytes>;                     \
    extern __shared__ __align__(1024) mla_fp8::u8 shared_bytes[];                       \
    aq::run_shared<Config>(params, *reinterpret_cast<Config::Shared*>(shared_bytes));   \
  }
MLA_FP8_ABSORB_Q_SHARED_TILES(MLA_FP8_KERNEL)
#undef MLA_FP8_KERNEL

#define MLA_FP8_KERNEL(symbol, tokens, warpgroups, tiles, out_bytes, ctas_per_sm, start_us, serial_us) \
  extern "C" __global__ void __launch_bounds__(warpgroups* aq::kWarpgroup, ctas_per_sm)                \
      symbol(const __grid_constant__ aq::Params params) {                                              \
    using Config = aq::FewConfig<tokens, warpgroups, tiles, out_bytes>;                                \
    extern __shared__ __align__(1024) mla_fp8::u8 shared_bytes[];                                      \
    aq::run_few<Config>(params, *reinterpret_cast<Config::Shared*>(shared_bytes));                     \
  }
MLA_FP8_ABSORB_Q_FEW_TILES(MLA_FP8_KERNEL)
#undef MLA_FP8_KERNEL

#define MLA_FP8_KERNEL(symbol, out_bytes, start_us)                                                    \
  extern "C" __global__ void __launch_bounds__(aq::kPhasedThreads, 1)                                  \
      symbol(const __grid_constant__ aq::Params params) {                                              \
    extern __shared__ __align__(1024) mla_fp8::u8 shared_bytes[];                                      \
    aq::run_phased<out_bytes>(params, *reinterpret_cast<aq::PhasedStorage<out_bytes>*>(shared_bytes)); \
  }
MLA_FP8_ABSORB_Q_PHASED_TILES(MLA_FP8_KERNEL)
#undef MLA_FP8_KERNEL
