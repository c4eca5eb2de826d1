#include "bindings/checks.h"

#include <stdexcept>

#include "bindings/overlap.h"

namespace mla_fp8 {
namespace {

template <typename T>
std::string list_of(const T* values, i64 count) {
  std::string text = "[";
  for (i64 i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    text += values[i] == kAny ? std::string("*") : std::to_string(values[i]);
  }
  return text + "]";
}

}  // namespace

std::string shape_of(const View& view) { return list_of(view.sizes, view.dim); }
std::string strides_of(const View& view) { return list_of(view.strides, view.dim); }

void Checks::fail(const std::string& argument, const std::string& rule, const std::string& got) const {
  throw std::runtime_error(std::string(op_) + ": " + argument + " must " + rule + ", got " + got);
}

void Checks::rank(const Argument& argument, i64 dim, const char* form) const {
  if (argument.view.dim != dim) fail(argument.name, std::string("have shape ") + form, shape_of(argument.view));
}

void Checks::dtype(const Argument& argument, std::initializer_list<Dtype> allowed) const {
  for (Dtype dtype : allowed) {
    if (argument.view.dtype == dtype) return;
  }
  std::string rule = "be ";
  for (const Dtype* dtype = allowed.begin(); dtype != allowed.end(); ++dtype) {
    rule += (dtype == allowed.begin() ? "" : " or ") + name_of(*dtype);
  }
  fail(argument.name, rule, name_of(argument.view));
}

void Checks::shape(const Argument& argument, Extents expected, const char* form) const {
  const View& view = argument.view;
  bool matches = view.dim == static_cast<i64>(expected.size());
  for (i64 i = 0; matches && i < view.dim; ++i) {
    const i64 extent = expected.begin()[i];
    matches = extent == kAny || extent == view.sizes[i];
  }
  if (matches) return;
  fail(argument.name,
       std::string("have shape ") + form + " = " + list_of(expected.begin(), static_cast<i64>(expected.size())),
       shape_of(view));
}

void Checks::extent(const char* argument, const char* extent, i64 value, i64 multiple, i64 most) const {
  if (value > 0 && value % multiple == 0 && value <= most) return;
  fail(argument,
       std::string("have ") + extent + " a multiple of " + std::to_string(multiple) + " in [" +
           std::to_string(multiple) + ", " + std::to_string(most) + "]",
       std::to_string(value));
}

void Checks::last_dim_contiguous(const Argument& argument) const {
  const View& view = argument.view;
  if (view.sizes[view.dim - 1] > 1 && view.strides[view.dim - 1] != 1) {
    fail(argument.name, "have a contiguous last dim", "strides " + strides_of(view));
  }
}

void Checks::fp8_matrix(const Argument& argument) const {
  dtype(argument, {Dtype::kE4m3});
  last_dim_contiguous(argument);
  const View& view = argument.view;
  for (i64 i = 0; i + 1 < view.dim; ++i) {
    if (view.sizes[i] > 1 && view.strides[i] % kWeightAlignBytes != 0) {
      fail(argument.name,
           "have strides that are multiples of " + std::to_string(kWeightAlignBytes) + ", but for the last dim",
           "strides " + strides_of(view));
    }
  }
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  if (view.is_cuda() && address % kWeightAlignBytes != 0) {
    fail(argument.name, "start at a multiple of " + std::to_string(kWeightAlignBytes) + " bytes",
         "an address that is " + std::to_string(address % kWeightAlignBytes) + " bytes past one");
  }
}

void Checks::out_scale(const Argument& argument) const {
  if (!argument.view) return;
  dtype(argument, {Dtype::kFp32});
  if (argument.view.numel() != 1) fail(argument.name, "have one element", "shape " + shape_of(argument.view));
}

void Checks::placed(const Argument& argument, const Argument& first) const {
  if (!argument.view.same_device(first.view)) {
    fail(argument.name, "be on the device of " + std::string(first.name) + ", " + device_of(first.view),
         device_of(argument.view));
  }
  const i64 bytes = bytes_per_element(argument.view.dtype);
  const auto beyond = reinterpret_cast<uintptr_t>(argument.view.data) % static_cast<uintptr_t>(bytes);
  if (beyond == 0) return;
  fail(argument.name, "start at a multiple of its element's " + std::to_string(bytes) + " bytes",
       "an address that is " + std::to_string(beyond) + " bytes past one");
}

void Checks::no_grad(const Argument& argument) const {
  if (!grad_mode_is_enabled() || !requires_grad(argument.view)) return;
  fail(argument.name, "not require grad, as this op has no backward (call it under torch.no_grad())",
       "requires_grad=True");
}

void Checks::inputs(Arguments arguments) const {
  for (const Argument& argument : arguments) {
    if (argument.view) placed(argument, *arguments.begin());
  }
  for (const Argument& argument : arguments) {
    if (argument.view) no_grad(argument);
  }
}

void Checks::disjoint(const Argument& output, const Argument& other) const {
  if (!share_memory(output.view, other.view)) return;
  fail(output.name, "not overlap " + std::string(other.name),
       "shapes " + shape_of(output.view) + " and " + shape_of(other.view) + " that share memory");
}

void Checks::output(const Argument& output, Arguments inputs) const {
  placed(output, *inputs.begin());
  no_grad(output);
  if (overlaps_itself(output.view)) {
    fail(output.name, "have each element in a place of its own",
         "shape " + shape_of(output.view) + " with strides " + strides_of(output.view));
  }
  for (const Argument& input : inputs) disjoint(output, input);
}

}  // namespace mla_fp8
