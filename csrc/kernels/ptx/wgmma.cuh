// Warpgroup matrix multiply. Four warps issue it together, it runs asynchronously, and FP8 operands
// must be K-major.
#pragma once

#include "types.h"

namespace mla_fp8::ptx {

// Not an instruction: it keeps what made the value before this point, so that no write to an A
// register falls between two wgmmas.
MLA_FP8_DEVICE void settle(u32& value) { asm volatile("" : "+r"(value)::"memory"); }

// Orders the warpgroup's earlier writes to accumulators and A registers before the next wgmma. It
// comes first in every batch.
MLA_FP8_DEVICE void wgmma_fence_sync_aligned() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Each thread's writes to shared memory become visible to wgmma; a CTA barrier follows.
MLA_FP8_DEVICE void fence_proxy_async_shared_cta() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Closes the batch of wgmmas issued since the last one.
MLA_FP8_DEVICE void wgmma_commit_group_sync_aligned() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending batches run: after it, the older batches' accumulators and A
// registers may be used, and the shared memory that they read may be refilled.
template <int kPending>
MLA_FP8_DEVICE void wgmma_wait_group_sync_aligned() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The accumulators d[i], d[i+1], ..., as operands that are read and written.
#define MLA_FP8_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MLA_FP8_D8(d, i) MLA_FP8_D4(d, i), MLA_FP8_D4(d, i + 4)
#define MLA_FP8_D16(d, i) MLA_FP8_D8(d, i), MLA_FP8_D8(d, i + 8)
#define MLA_FP8_D64(d) MLA_FP8_D16(d, 0), MLA_FP8_D16(d, 16), MLA_FP8_D16(d, 32), MLA_FP8_D16(d, 48)
// One wgmma, `operands` its text between shape and flags, "%" #p the operand that is `accumulate`.
#define MLA_FP8_WGMMA(shape, operands, p) \
  "{\n.reg .pred accumulate;\n"           \
  "setp.ne.b32 accumulate, %" #p          \
  ", 0;\n"                                \
  "wgmma.mma_async.sync.aligned." shape ".f32.e4m3.e4m3 " operands ", accumulate, 1, 1;\n}\n"
#define MLA_FP8_64_REGISTERS                                                                    \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "  \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "  \
  "%56, %57, %58, %59, %60, %61, %62, %63}, "

// d [64,128] = a [64,32] * b [128,32]^T (+ d if accumulate): e4m3, a in registers, b in shared
// memory. The one kind of multiply in this library: every op steps through K by 32 in ascending
// order, so that they agree bit for bit.
MLA_FP8_DEVICE void wgmma_m64n128k32_f32_e4m3_e4m3(float (&d)[64], const u32 (&a)[4], u64 b_descriptor,
                                                   bool accumulate) {
  asm volatile(MLA_FP8_WGMMA("m64n128k32", MLA_FP8_64_REGISTERS "{%64, %65, %66, %67}, %68", 69)
               : MLA_FP8_D64(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(static_cast<i32>(accumulate)));
}

// d [64,N] = a [64,32] * b [N,32]^T (+ d if accumulate) of N = 128, 32, 16 and 8: both in shared
// memory. The same sums, bit for bit. Where N is few, the weights are a (swap AB, few.cuh).
MLA_FP8_DEVICE void wgmma_m64n128k32_f32_e4m3_e4m3_shared(float (&d)[64], u64 a_descriptor, u64 b_descriptor,
                                                          bool accumulate) {
  asm volatile(MLA_FP8_WGMMA("m64n128k32", MLA_FP8_64_REGISTERS "%64, %65", 66)
               : MLA_FP8_D64(d)
               : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<i32>(accumulate)));
}
MLA_FP8_DEVICE void wgmma_m64n32k32_f32_e4m3_e4m3_shared(float (&d)[16], u64 a_descriptor, u64 b_descriptor,
                                                         bool accumulate) {
  asm volatile(
      MLA_FP8_WGMMA("m64n32k32", "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17", 18)
      : MLA_FP8_D16(d, 0)
      : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<i32>(accumulate)));
}
MLA_FP8_DEVICE void wgmma_m64n16k32_f32_e4m3_e4m3_shared(float (&d)[8], u64 a_descriptor, u64 b_descriptor,
                                                         bool accumulate) {
  asm volatile(MLA_FP8_WGMMA("m64n16k32", "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9", 10)
               : MLA_FP8_D8(d, 0)
               : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<i32>(accumulate)));
}
MLA_FP8_DEVICE void wgmma_m64n8k32_f32_e4m3_e4m3_shared(float (&d)[4], u64 a_descriptor, u64 b_descriptor,
                                                        bool accumulate) {
  asm volatile(MLA_FP8_WGMMA("m64n8k32", "{%0, %1, %2, %3}, %4, %5", 6)
               : MLA_FP8_D4(d, 0)
               : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<i32>(accumulate)));
}
#undef MLA_FP8_64_REGISTERS
#undef MLA_FP8_WGMMA
#undef MLA_FP8_D64
#undef MLA_FP8_D16
#undef MLA_FP8_D8
#undef MLA_FP8_D4

}  // namespace mla_fp8::ptx
