// What the op files (op_<name>.cpp) share: each checks its arguments, allocates, and runs the kernel of the device.
#pragma once

#include <string>

#include "args.h"
#include "bindings/checks.h"
#include "bindings/ops.h"
#include "bindings/tensor.h"
#include "cpu/kernels.h"
#include "gpu/cuda.h"

namespace mla_fp8::ops {

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline View view_of_optional(const OptionalTensor& tensor) { return tensor.has_value() ? view_of(*tensor) : View{}; }

inline void copy_strides(int64_t* to, const View& from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from.strides[i];
}

// Runs the kernel of the input's device on arguments that have passed every check.
template <typename Args>
void run(void (*cpu_kernel)(const Args&, const ParallelFor&), void (*cuda_kernel)(const Args&, int, void*),
         const View& input, const Args& args) {
  if (input.is_cuda()) {
    cuda_kernel(args, input.device_index, current_stream(input.device_index));
  } else {
    cpu_kernel(args, &parallel_for);
  }
}

// bf16 or fp16 [S, H, K] with a contiguous last dim; `extent` is the letter that `form` gives the last one.
void check_activation(const Checks& check, const Argument& x, const char* form, const char* extent);

// e4m3 [H, N, K] and its fp32 block scales [H, N/128, K/128]; `extent` is the letter of N.
void check_weight(const Checks& check, const Argument& w, const Argument& w_scale, int64_t heads, int64_t k,
                  const char* form, const char* extent, const char* scale_form);

}  // namespace mla_fp8::ops
