// The kernels of tiles.h for compute capability 9.0, one symbol a line: those of the op for which the including file defines
// MLA_FP8_KERNEL_<op> as MLA_FP8_KERNEL.
#pragma once

#include "kernels/sm90/tiles.h"

#include "kernels/absorb_q.cuh"
#include "kernels/absorb_q_few.cuh"
#include "kernels/absorb_q_kloop.cuh"
#include "kernels/absorb_q_phased.cuh"
#include "kernels/absorb_q_shared.cuh"
#include "kernels/bmm.cuh"
#include "kernels/quantize_q_nope.cuh"
#include "kernels/v_up.cuh"
#include "kernels/v_up_few.cuh"
#include "kernels/v_up_shared.cuh"

using namespace mla_fp8;

namespace {

// A schedule's kernel body.
template <class Schedule>
struct Body;

template <int... A>
struct Body<absorb_q::Config<A...>> {
  using C = absorb_q::Config<A...>;
  static MLA_FP8_DEVICE void run(const absorb_q::Params& p, typename C::Shared& shared) { absorb_q::run<C>(p, shared); }
};
template <int... A>
struct Body<absorb_q::SharedConfig<A...>> {
  using C = absorb_q::SharedConfig<A...>;
  static MLA_FP8_DEVICE void run(const absorb_q::Params& p, typename C::Shared& shared) {
    absorb_q::run_shared<C>(p, shared);
  }
};
template <int... A>
struct Body<absorb_q::PhasedConfig<A...>> {
  using C = absorb_q::PhasedConfig<A...>;
  static MLA_FP8_DEVICE void run(const absorb_q::Params& p, typename C::Shared& shared) {
    absorb_q::run_phased<C>(p, shared);
  }
};
template <int... A>
struct Body<absorb_q::FewConfig<A...>> {
  using C = absorb_q::FewConfig<A...>;
  static MLA_FP8_DEVICE void run(const absorb_q::Params& p, typename C::Shared& shared) {
    absorb_q::run_few<C>(p, shared);
  }
};
template <int... A>
struct Body<kloop::Config<absorb_q::Params, A...>> {
  using C = kloop::Config<absorb_q::Params, A...>;
  static MLA_FP8_DEVICE void run(const absorb_q::Params& p, typename C::Shared& shared) {
    absorb_q::run_kloop<C>(p, shared);
  }
};
template <int... A>
struct Body<v_up::SharedConfig<A...>> {
  using C = v_up::SharedConfig<A...>;
  static MLA_FP8_DEVICE void run(const v_up::Params& p, typename C::Shared& shared) { v_up::run_shared<C>(p, shared); }
};
template <int... A>
struct Body<v_up::FewConfig<A...>> {
  using C = v_up::FewConfig<A...>;
  static MLA_FP8_DEVICE void run(const v_up::Params& p, typename C::Shared& shared) { v_up::run_few<C>(p, shared); }
};
template <int... A>
struct Body<kloop::Config<v_up::Params, A...>> {
  using C = kloop::Config<v_up::Params, A...>;
  static MLA_FP8_DEVICE void run(const v_up::Params& p, typename C::Shared& shared) { v_up::run<C>(p, shared); }
};
template <int... A>
struct Body<kloop::Config<bmm::Params, A...>> {
  using C = kloop::Config<bmm::Params, A...>;
  static MLA_FP8_DEVICE void run(const bmm::Params& p, typename C::Shared& shared) { bmm::run<C>(p, shared); }
};
template <int... A>
struct Body<quantize_q_nope::Config<A...>> {
  using C = quantize_q_nope::Config<A...>;
  static MLA_FP8_DEVICE void run(const quantize_q_nope::Params& p, typename C::Shared&) { quantize_q_nope::run<C>(p); }
};

}  // namespace

#define MLA_FP8_KERNEL(symbol, schedule, ctas_per_sm)                                             \
  extern "C" __global__ void __launch_bounds__(MLA_FP8_SCHEDULE(schedule)::kThreads, ctas_per_sm) \
      symbol(const __grid_constant__ MLA_FP8_SCHEDULE(schedule)::Params params) {                 \
    using Schedule = MLA_FP8_SCHEDULE(schedule);                                                  \
    extern __shared__ __align__(1024) u8 shared_bytes[];                                          \
    Body<Schedule>::run(params, *reinterpret_cast<Schedule::Shared*>(shared_bytes));              \
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
#define MLA_FP8_KERNEL_OF_OP(symbol, op, schedule, ctas_per_sm, start_us, serial_us) \
  MLA_FP8_KERNEL_##op(symbol, schedule, ctas_per_sm)
MLA_FP8_TILES(MLA_FP8_KERNEL_OF_OP)
