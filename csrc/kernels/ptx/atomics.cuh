// Relaxed accesses to a counter in global memory, and the SM's clock, for phases.cuh. None of them
// orders other memory.
#pragma once

#include "types.h"

namespace mla_fp8::ptx {

MLA_FP8_DEVICE u64 atom_add_relaxed_gpu(u64* to, u64 value) {
  u64 before;
  asm volatile("atom.add.relaxed.gpu.global.u64 %0, [%1], %2;" : "=l"(before) : "l"(to), "l"(value));
  return before;
}

MLA_FP8_DEVICE u64 ld_relaxed_gpu(const u64* from) {
  u64 value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from));
  return value;
}

// Cycles of this SM, modulo 2^32.
MLA_FP8_DEVICE u32 clock() {
  u32 cycles;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(cycles));
  return cycles;
}

}  // namespace mla_fp8::ptx
