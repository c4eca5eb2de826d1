// Global memory accesses wider or more particular than plain C++ gives.
#pragma once

#include "kernels/ptx/mbarrier.cuh"
#include "types.h"

namespace mla_fp8::ptx {

// 16 or 8 bytes that this SM reads once, so they are not kept in L1. Volatile keeps a batch of
// loads together, before its first use and after griddepcontrol_wait.
MLA_FP8_DEVICE void ld_global_no_allocate_v4(u32 (&to)[4], const void* from) {
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(from));
}

MLA_FP8_DEVICE void ld_global_no_allocate_v2(u32* to, const void* from) {
  asm volatile("ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
}

// Every aligned tile writes its outputs so: this launch does not read them, and they are the first
// to leave L2. At S = 128 absorb_q takes 11.5 us with these stores and 15.2 with plain ones; at S =
// 8192 it takes 506 and 565 (H100).
MLA_FP8_DEVICE void st_global_cs_v4(void* to, uint4 value) {
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w));
}
MLA_FP8_DEVICE void st_global_cs_v2(void* to, uint2 value) {
  asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(value.x), "r"(value.y));
}
MLA_FP8_DEVICE void st_global_cs_b32(void* to, u32 value) {
  asm volatile("st.global.cs.b32 [%0], %1;" ::"l"(to), "r"(value));
}
MLA_FP8_DEVICE void st_global_cs_b16(void* to, u16 value) {
  asm volatile("st.global.cs.b16 [%0], %1;" ::"l"(to), "h"(value));
}

// Four matrices of 8 rows of 16 bytes from shared memory: lane i gives the address of row i % 8 of
// matrix i / 8, and gets of each matrix the four bytes 4 (i % 4).. of row i / 4.
MLA_FP8_DEVICE void ldmatrix_sync_aligned_m8n8_x4_shared_b16(u32 (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace mla_fp8::ptx
