// The CTA's numbered barriers, 0 to 15, of which __syncthreads() is 0: `threads` threads, whole
// warps, take part, and what was written or read before is ordered before what comes after. A side
// that does not have to wait only arrives.
#pragma once

#include "types.h"

namespace mla_fp8::ptx {

MLA_FP8_DEVICE void barrier_arrive_aligned(int barrier, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

MLA_FP8_DEVICE void barrier_sync_aligned(int barrier, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace mla_fp8::ptx
