#include "bindings/checks.h"

#include <stdexcept>

#include "bindings/overlap.h"

namespace mla_fp8 {
namespace {

std::string list_of(const int64_t* values, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) {
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

void Checks::rank(const Argument& argument, int64_t dim, const char* form) const {
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

void Checks::shape(const Argument& argument, std::initializer_list<int64_t> expected, const char* form) const {
  const View& view = argument.view;
  bool matches = view.dim == static_cast<int64_t>(expected.size());
  for (int64_t i = 0; matches && i < view.dim; ++i) {
    const int64_t extent = expected.begin()[i];
    matches = extent == kAny || extent == view.sizes[i];
  }
  if (matches) return;
  fail(argument.name,
       std::string("have shape ") + form + " = " + list_of(expected.begin(), static_cast<int64_t>(expected.size())),
       shape_of(view));
}

void Checks::extent(const char* argument, const char* extent, int64_t value, int64_t multiple, int64_t most) const {
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
  for (int64_t i = 0; i + 1 < view.dim; ++i) {
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

void Checks::aligned(const Argument& argument) const {
  const int64_t bytes = bytes_per_element(argument.view.dtype);
  const auto beyond = reinterpret_cast<uintptr_t>(argument.view.data) % static_cast<uintptr_t>(bytes);
  if (beyond == 0) return;
  fail(argument.name, "start at a multiple of its element's " + std::to_string(bytes) + " bytes",
       "an address that is " + std::to_string(beyond) + " bytes past one");
}

void Checks::inputs(std::initializer_list<Argument> arguments) const {
  const Argument& first = *arguments.begin();
  for (const Argument& argument : arguments) {
    if (argument.view && !argument.view.same_device(first.view)) {
      fail(argument.name, "be on the device of " + std::string(first.name) + ", " + device_of(first.view),
           device_of(argument.view));
    }
    aligned(argument);
  }
  if (!grad_mode_is_enabled()) return;
  for (const Argument& argument : arguments) {
    if (argument.view && requires_grad(argument.view)) {
      fail(argument.name, "not require grad, as this op has no backward (call it under torch.no_grad())",
           "requires_grad=True");
    }
  }
}

void Checks::output(const Argument& output, std::initializer_list<Argument> others) const {
  const Argument& first = *others.begin();
  if (!output.view.same_device(first.view)) {
    fail(output.name, "be on the device of " + std::string(first.name) + ", " + device_of(first.view),
         device_of(output.view));
  }
  aligned(output);
  if (grad_mode_is_enabled() && requires_grad(output.view)) {
    fail(output.name, "not require grad, as this op has no backward (call it under torch.no_grad())",
         "requires_grad=True");
  }
  if (overlaps_itself(output.view)) {
    fail(output.name, "have each element in a place of its own",
         "shape " + shape_of(output.view) + " with strides " + strides_of(output.view));
  }
  for (const Argument& other : others) {
    if (share_memory(output.view, other.view)) {
      fail(output.name, "not overlap " + std::string(other.name),
           "shapes " + shape_of(output.view) + " and " + shape_of(other.view) + " that share memory");
    }
  }
}

}  // namespace mla_fp8
