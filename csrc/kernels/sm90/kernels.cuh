// The kernels of tiles.h for compute capability 9.0, one symbol a line: those of the op for which
// the including file defines MLA_FP8_KERNEL_<op> as MLA_FP8_KERNEL.
#pragma once

#include "kernels/quantize_q_nope.cuh"
#include "kernels/sm90/few.cuh"
#include "kernels/sm90/kloop.cuh"
#include "kernels/sm90/own.cuh"
#include "kernels/sm90/pipelined.cuh"
#include "kernels/sm90/shared.cuh"
#include "kernels/sm90/tiles.h"

using namespace mla_fp8;
using namespace mla_fp8::sm90;

namespace {

// A schedule's steps.
template <class R, class S, int... A>
MLA_FP8_DEVICE void run(FewRows<R, S, A...>, const Params& params, typename FewRows<R, S, A...>::Shared& shared) {
  run_few<FewRows<R, S, A...>>(params, shared);
}
template <class R, class S, int... A>
MLA_FP8_DEVICE void run(SharedRows<R, S, A...>, const Params& params, typename SharedRows<R, S, A...>::Shared& shared) {
  run_shared<SharedRows<R, S, A...>>(params, shared);
}
template <class R, class S, int... A>
MLA_FP8_DEVICE void run(OwnRows<R, S, A...>, const Params& params, typename OwnRows<R, S, A...>::Shared& shared) {
  run_own<OwnRows<R, S, A...>>(params, shared);
}
template <class R, class S, int... A>
MLA_FP8_DEVICE void run(Pipelined<R, S, A...>, const Params& params, typename Pipelined<R, S, A...>::Shared& shared) {
  run_pipelined<Pipelined<R, S, A...>>(params, shared);
}
template <class R, class S, int... A>
MLA_FP8_DEVICE void run(KLoop<R, S, A...>, const Params& params, typename KLoop<R, S, A...>::Shared& shared) {
  run_kloop<KLoop<R, S, A...>>(params, shared);
}
template <int kAlign>
MLA_FP8_DEVICE void run(quantize_q_nope::Rows<kAlign>, const quantize_q_nope::Params& params,
                        quantize_q_nope::NoStorage&) {
  quantize_q_nope::run<quantize_q_nope::Rows<kAlign>>(params);
}

}  // namespace

#define MLA_FP8_KERNEL(symbol, schedule, ctas_per_sm)                                             \
  extern "C" __global__ void __launch_bounds__(MLA_FP8_SCHEDULE(schedule)::kThreads, ctas_per_sm) \
      symbol(const __grid_constant__ MLA_FP8_SCHEDULE(schedule)::Params params) {                 \
    using Schedule = MLA_FP8_SCHEDULE(schedule);                                                  \
    extern __shared__ __align__(1024) u8 shared_bytes[];                                          \
    run(Schedule{}, params, *reinterpret_cast<Schedule::Shared*>(shared_bytes));                  \
  }
#ifndef MLA_FP8_KERNEL_kAbsorbQ
#define MLA_FP8_KERNEL_kAbsorbQ(...)
#endif
#ifndef MLA_FP8_KERNEL_kVUp
#define MLA_FP8_KERNEL_kVUp(...)
#endif
#ifndef MLA_FP8_KERNEL_kBmm
#define MLA_FP8_KERNEL_kBmm(...)
#endif
#ifndef MLA_FP8_KERNEL_kQuantizeQNope
#define MLA_FP8_KERNEL_kQuantizeQNope(...)
#endif
#define MLA_FP8_KERNEL_OF_OP(symbol, op, schedule, ctas_per_sm, ...) MLA_FP8_KERNEL_##op(symbol, schedule, ctas_per_sm)
MLA_FP8_SM90_TILES(MLA_FP8_KERNEL_OF_OP)
