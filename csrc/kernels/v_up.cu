// One symbol a line of the tile table.
#include "config/tiles.h"
#include "kernels/v_up.cuh"
#include "kernels/v_up_few.cuh"
#include "kernels/v_up_shared.cuh"

namespace vu = mla_fp8::v_up;

#define MLA_FP8_KERNEL(symbol, k, stages, warpgroups, out_bytes, align_bytes, ctas_per_sm, serial_us) \
  extern "C" __global__ void __launch_bounds__(warpgroups* mla_fp8::kloop::kWarpgroup, ctas_per_sm)   \
      symbol(const __grid_constant__ vu::Params params) {                                             \
    using Config = mla_fp8::kloop::Config<k, stages, warpgroups, 2, out_bytes, align_bytes>;          \
    extern __shared__ __align__(1024) mla_fp8::u8 shared_bytes[];                                     \
    vu::run<Config>(params, *reinterpret_cast<Config::Shared*>(shared_bytes));                        \
  }
MLA_FP8_V_UP_KLOOP_TILES(MLA_FP8_KERNEL)
#undef MLA_FP8_KERNEL

#define MLA_FP8_KERNEL(symbol, out_bytes, start_us, serial_us)                                  \
  extern "C" __global__ void __launch_bounds__(vu::kSharedThreads, 1)                           \
      symbol(const __grid_constant__ vu::Params params) {                                       \
    extern __shared__ __align__(1024) mla_fp8::u8 shared_bytes[];                               \
    vu::run_shared<out_bytes>(params, *reinterpret_cast<vu::SharedRowsStorage*>(shared_bytes)); \
  }
MLA_FP8_V_UP_SHARED_TILES(MLA_FP8_KERNEL)
#undef MLA_FP8_KERNEL

#define MLA_FP8_KERNEL(symbol, tokens, out_bytes, ctas_per_sm, start_us, serial_us)                       \
  extern "C" __global__ void __launch_bounds__(vu::kFewThreads, ctas_per_sm)                              \
      symbol(const __grid_constant__ vu::Params params) {                                                 \
    extern __shared__ __align__(1024) mla_fp8::u8 shared_bytes[];                                         \
    vu::run_few<tokens, out_bytes>(params, *reinterpret_cast<vu::FewRowsStorage<tokens>*>(shared_bytes)); \
  }
MLA_FP8_V_UP_FEW_TILES(MLA_FP8_KERNEL)
#undef MLA_FP8_KERNEL
