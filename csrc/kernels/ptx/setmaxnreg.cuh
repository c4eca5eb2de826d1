// Registers a thread, moved between the warpgroups of a CTA. Every warp of a warpgroup executes it.
#pragma once

#include "types.h"

namespace mla_fp8::ptx {

// Gives back what is above kRegisters.
template <int kRegisters>
MLA_FP8_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Waits until the CTA has as many to give.
template <int kRegisters>
MLA_FP8_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace mla_fp8::ptx
