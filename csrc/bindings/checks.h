// Every rule that an op puts on its arguments, and the text of every error: `<op>: <argument> must
// <rule>, got <value>`. Nothing is allocated, launched or written before all checks of a call have
// passed.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>

#include "bindings/tensor.h"

namespace mla_fp8 {

// A named tensor argument; an optional one may be missing.
struct Argument {
  const char* name;
  View view;

  Argument(const char* argument, const View& tensor) : name(argument), view(tensor) {}
  Argument(const char* argument, const torch::stable::Tensor& tensor) : name(argument), view(view_of(tensor)) {}
  Argument(const char* argument, const std::optional<torch::stable::Tensor>& tensor)
      : name(argument), view(tensor.has_value() ? view_of(*tensor) : View{}) {}
};
using Arguments = std::initializer_list<Argument>;

class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}
  const char* op() const { return op_; }

  [[noreturn]] void fail(const std::string& argument, const std::string& rule, const std::string& got) const;

  // Number of dimensions; `form` as in "[S, H, D]".
  void rank(const Argument& argument, i64 dim, const char* form) const;
  void dtype(const Argument& argument, std::initializer_list<Dtype> allowed) const;
  // Rank and extents, kAny leaving one free.
  void shape(const Argument& argument, Extents expected, const char* form) const;
  // A positive multiple of `multiple`, at most `most`.
  void extent(const char* argument, const char* extent, i64 value, i64 multiple, i64 most) const;
  void last_dim_contiguous(const Argument& argument) const;
  // e4m3, last dim contiguous, the other strides (and on CUDA the address) multiples of 16 bytes.
  void fp8_matrix(const Argument& argument) const;
  // fp32 with one element, or not given.
  void out_scale(const Argument& argument) const;
  // All are on the device of the first, each address is a multiple of its element's size, and none
  // requires grad in grad mode.
  void inputs(Arguments arguments) const;
  // Written in place: as inputs, no two elements in one place, disjoint from every input.
  void output(const Argument& output, Arguments inputs) const;
  void disjoint(const Argument& output, const Argument& other) const;

 private:
  void placed(const Argument& argument, const Argument& first) const;
  void aligned(const Argument& argument, int bytes, const char* whose) const;
  void no_grad(const Argument& argument) const;

  const char* op_;
};

std::string shape_of(const View& view);
std::string strides_of(const View& view);

}  // namespace mla_fp8
