// What the op files (op_<name>.cpp) share: each checks its arguments, finds a place for its
// results, and runs the kernel of the device.
#pragma once

#include "bindings/checks.h"
#include "bindings/ops.h"
#include "bindings/tensor.h"
#include "cpu/kernels.h"
#include "gpu/launch.h"
#include "text.h"

namespace mla_fp8::ops {

inline i64 round_up(i64 value, i64 multiple) { return (value + multiple - 1) / multiple * multiple; }

// Strides of some dims of a tensor, in a record's order.
template <size_t N>
void copy_strides(i64 (&to)[N], const View& from, const int (&dims)[N]) {
  for (size_t i = 0; i < N; ++i) to[i] = from.strides[dims[i]];
}

// What an op's documentation calls its shapes, and of the extents those that it checks.
struct Forms {
  const char *x, *k, *w, *n, *w_scale;
};

// bf16 or fp16 [S, H, K] with a contiguous last dim.
void check_activation(const Checks& check, const Argument& x, const char* form, const char* extent);

// e4m3 [heads, N, K] and its fp32 block scales [heads, N/128, K/128]; all of them and N go into the
// product.
void take_weight(const Checks& check, const Argument& w, const Argument& w_scale, const Forms& forms, Product& product);

// Checks x, w, w_scale and, of an op that takes them, out_scale and q_pe; fills all but the
// outputs.
Product take_inputs(const Checks& check, Op op, Arguments inputs, const Forms& forms, bool fp8_activations);

// A result, and the tensor that it is written into where the caller gave one.
struct Result {
  const char* name;
  const char* form;
  Dtype dtype;
  const Tensor* given;
};

// The given tensor, once it has passed every check, or a new one on the device of the first input.
// Where `strides` are named, a new tensor has these and a given one may have any; otherwise the
// last dim is contiguous.
Tensor place(const Checks& check, const Result& result, Extents sizes, Arguments inputs, Extents strides = {});

// Where the product goes: [s, heads, n + pe], or for another order of dims these of s and heads.
void set_output(Product& product, const View& out, const int (&dims)[2] = {0, 1});

// Runs the kernel of the first input's device. An op may do without one for CUDA.
template <typename Record>
void run(const Checks& check, Arguments inputs, const Record& record,
         void (*cpu_kernel)(const Record&, const cpu::ParallelFor&),
         void (*cuda_kernel)(const Record&, int, void*) = nullptr) {
  const Argument& first = *inputs.begin();
  if (!first.view.is_cuda()) return cpu_kernel(record, &parallel_for);
  if (cuda_kernel == nullptr)
    check.fail(first.name, "be on a CPU, as this op has no CUDA kernel", device_of(first.view));
  cuda_kernel(record, first.view.device_index, current_stream(first.view.device_index));
}

}  // namespace mla_fp8::ops
