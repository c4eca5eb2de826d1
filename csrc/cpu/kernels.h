// The ops on a CPU: plain C++17, no torch. Records have passed the bindings' checks. None of these
// throws or allocates; scratch is thread-local. Activations and outputs may have any strides with a
// contiguous last dim and need only their element's alignment.
#pragma once

#include <cstdint>

#include "product.h"
#include "quantize.h"

namespace mla_fp8::cpu {

// Runs body(begin, end, context) over parts of [0, count), on several threads where there are some.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context),
                             void* context);

void multiply(const Product& product, const ParallelFor& parallel_for);
void quantize_q_nope(const QuantizeArgs& args, const ParallelFor& parallel_for);

}  // namespace mla_fp8::cpu

// The instruction set in use: "amx", "avx512", "avx2" or "portable". All give the same bits, but of
// exact activations amx has its own.
extern "C" __attribute__((visibility("default"))) const char* mla_fp8_cpu_instruction_set();
