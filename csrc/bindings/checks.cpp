#include "bindings/checks.h"

#include <algorithm>
#include <stdexcept>

#include "bindings/overlap.h"
#include "text.h"

namespace mla_fp8 {

std::string shape_of(const View& view) { return list_of(view.sizes, view.dim); }
std::string strides_of(const View& view) { return list_of(view.strides, view.dim); }

void Checks::fail(const std::string& argument, const std::string& rule, const std::string& got) const {
  throw std::runtime_error(text(op_, ": ", argument, " must ", rule, ", got ", got));
}

void Checks::rank(const Argument& argument, i64 dim, const char* form) const {
  if (argument.view.dim != dim) fail(argument.name, text("have shape ", form), shape_of(argument.view));
}

void Checks::dtype(const Argument& argument, std::initializer_list<Dtype> allowed) const {
  std::string names;
  for (const Dtype dtype : allowed) {
    if (argument.view.dtype == dtype) return;
    names += (names.empty() ? "" : " or ") + name_of(dtype);
  }
  fail(argument.name, "be " + names, name_of(argument.view));
}

void Checks::shape(const Argument& argument, Extents expected, const char* form) const {
  const View& view = argument.view;
  const auto fits = [](int64_t extent, int64_t size) { return extent == kAny || extent == size; };
  if (std::equal(expected.begin(), expected.end(), view.sizes, view.sizes + view.dim, fits)) return;
  fail(argument.name, text("have shape ", form, " = ", list_of(expected.begin(), expected.size())), shape_of(view));
}

void Checks::extent(const char* argument, const char* extent, i64 value, i64 multiple, i64 most) const {
  if (value > 0 && value % multiple == 0 && value <= most) return;
  fail(argument, text("have ", extent, " a multiple of ", multiple, " in [", multiple, ", ", most, "]"), text(value));
}

void Checks::last_dim_contiguous(const Argument& argument) const {
  const View& view = argument.view;
  if (view.sizes[view.dim - 1] <= 1 || view.strides[view.dim - 1] == 1) return;
  fail(argument.name, "have a contiguous last dim", "strides " + strides_of(view));
}

void Checks::fp8_matrix(const Argument& argument) const {
  dtype(argument, {Dtype::kE4m3});
  last_dim_contiguous(argument);
  const View& view = argument.view;
  for (i64 i = 0; i + 1 < view.dim; ++i) {
    if (view.sizes[i] <= 1 || view.strides[i] % kWeightAlignBytes == 0) continue;
    fail(argument.name, text("have strides that are multiples of ", kWeightAlignBytes, ", but for the last dim"),
         "strides " + strides_of(view));
  }
  if (view.is_cuda()) aligned(argument, kWeightAlignBytes, "");
}

void Checks::aligned(const Argument& argument, int bytes, const char* whose) const {
  const auto beyond = reinterpret_cast<uintptr_t>(argument.view.data) % static_cast<uintptr_t>(bytes);
  if (beyond == 0) return;
  fail(argument.name, text("start at a multiple of ", whose, bytes, " bytes"),
       text("an address that is ", beyond, " bytes past one"));
}

void Checks::out_scale(const Argument& argument) const {
  if (!argument.view) return;
  dtype(argument, {Dtype::kFp32});
  if (argument.view.numel() != 1) fail(argument.name, "have one element", "shape " + shape_of(argument.view));
}

void Checks::placed(const Argument& argument, const Argument& first) const {
  if (!argument.view.same_device(first.view)) {
    fail(argument.name, text("be on the device of ", first.name, ", ", device_of(first.view)),
         device_of(argument.view));
  }
  aligned(argument, bytes_per_element(argument.view.dtype), "its element's ");
}

void Checks::no_grad(const Argument& argument) const {
  if (!requires_grad(argument.view)) return;
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
  fail(output.name, text("not overlap ", other.name),
       text("shapes ", shape_of(output.view), " and ", shape_of(other.view), " that share memory"));
}

void Checks::output(const Argument& output, Arguments inputs) const {
  placed(output, *inputs.begin());
  no_grad(output);
  if (overlaps_itself(output.view)) {
    fail(output.name, "have each element in a place of its own",
         text("shape ", shape_of(output.view), " with strides ", strides_of(output.view)));
  }
  for (const Argument& input : inputs) disjoint(output, input);
}

}  // namespace mla_fp8
