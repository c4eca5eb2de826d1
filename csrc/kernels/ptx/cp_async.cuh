// Asynchronous copies of 16 bytes by each thread, from global to shared memory.
#pragma once

#include "kernels/ptx/mbarrier.cuh"
#include "types.h"

namespace mla_fp8::ptx {

// Copies `bytes` (0 to 16) and fills the rest of the 16 with zeros; `from` is 16-byte aligned. The
// copy bypasses L1.
MLA_FP8_DEVICE void cp_async_cg_16(void* to, const void* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

// Copies `bytes` (0 or 4), or fills with zeros.
MLA_FP8_DEVICE void cp_async_ca_4(void* to, const void* from, u32 bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

// Closes the batch of copies that the thread issued since the last one.
MLA_FP8_DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of the thread's batches are under way: this thread can read what the
// older ones copied.
template <int kPending>
MLA_FP8_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace mla_fp8::ptx
