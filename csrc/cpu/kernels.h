// The ops on a CPU: plain C++17, no torch. Arguments have passed the bindings' checks.
// None of these throws or allocates; scratch is thread-local. Activations and outputs may have any strides with a
// contiguous last dim and need only their element's alignment.
#pragma once

#include "args.h"

namespace mla_fp8::cpu {

void quantize_q_nope(const QuantizeArgs& args, const ParallelFor& parallel_for);
void bmm(const BmmArgs& args, const ParallelFor& parallel_for);
void absorb_q(const AbsorbQArgs& args, const ParallelFor& parallel_for);
void v_up(const VUpArgs& args, const ParallelFor& parallel_for);  // v_up_quantized where args.v_scale is not null

}  // namespace mla_fp8::cpu

// The instruction set in use: "avx512", "avx2" or "portable". All three give the same bits.
extern "C" __attribute__((visibility("default"))) const char* mla_fp8_cpu_instruction_set();
