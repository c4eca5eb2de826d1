// The copy engine: boxes of a tensor map, brought to shared memory or to L2. One thread issues.
#pragma once

#include "kernels/ptx/mbarrier.cuh"
#include "types.h"

namespace mla_fp8::ptx {

// Where a box begins, innermost first.
struct BoxOrigin {
  i32 x, y, z, u, v;
};

// Copies the box at `at` to shared memory and counts its bytes on `barrier`. Out-of-bounds elements
// become zeros.
MLA_FP8_DEVICE void cp_async_bulk_tensor_5d(void* to, const TensorMap* map, BoxOrigin at, u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(shared_address(to)),
      "l"(map), "r"(at.x), "r"(at.y), "r"(at.z), "r"(at.u), "r"(at.v), "r"(shared_address(barrier))
      : "memory");
}

// The same box, to L2 only: nothing of it is kept in this CTA, so it may run before
// griddepcontrol_wait.
MLA_FP8_DEVICE void cp_async_bulk_prefetch_tensor_5d(const TensorMap* map, BoxOrigin at) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(map), "r"(at.x),
               "r"(at.y), "r"(at.z), "r"(at.u), "r"(at.v));
}

// The tensor map itself, which lies in the kernel's argument.
MLA_FP8_DEVICE void prefetch_tensormap(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map)); }

}  // namespace mla_fp8::ptx
