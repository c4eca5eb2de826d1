// Global memory accesses wider or more particular than plain C++ gives.
#pragma once

#include "kernels/types.h"

namespace mla_fp8::ptx {

// 16 bytes that this SM reads once: L1 is left alone. Volatile keeps a batch of them together, before its first use, and after
// griddepcontrol_wait.
MLA_FP8_DEVICE void ld_global_no_allocate_v4(u32 (&to)[4], const void* from) {
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(from));
}

}  // namespace mla_fp8::ptx
