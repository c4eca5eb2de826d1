// Barriers in shared memory that count arrivals and bytes written by the copy engine.
#pragma once

#include "types.h"

namespace mla_fp8::ptx {

MLA_FP8_DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// One thread, before fence_mbarrier_init and the CTA barrier that lets others see it.
MLA_FP8_DEVICE void mbarrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the thread's mbarrier_init visible to the copy engine.
MLA_FP8_DEVICE void fence_mbarrier_init_release_cluster() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The producer's arrival, with the bytes that its copies will bring.
MLA_FP8_DEVICE void mbarrier_arrive_expect_tx(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// A consumer's arrival: its reads of the stage come before.
MLA_FP8_DEVICE void mbarrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// True once the phase of this parity has completed; it may first suspend the thread for a while.
// What the copies brought, and what was written before the arrivals, is visible then.
MLA_FP8_DEVICE bool mbarrier_try_wait_parity(u64* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

}  // namespace mla_fp8::ptx
