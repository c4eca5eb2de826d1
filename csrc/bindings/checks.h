// Every rule that an op puts on its arguments, and the text of every error: `<op>: <argument> must <rule>, got <value>`.
// Nothing is allocated, launched or written before all checks of a call have passed.
#pragma once

#include <initializer_list>
#include <string>

#include "bindings/tensor.h"

namespace mla_fp8 {

inline constexpr int64_t kAny = -1;  // an extent that a shape check leaves free

// A named tensor argument.
struct Argument {
  const char* name;
  View view;
};

class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  [[noreturn]] void fail(const std::string& argument, const std::string& rule, const std::string& got) const;

  // Number of dimensions; `form` as in "[S, H, D]".
  void rank(const Argument& argument, int64_t dim, const char* form) const;
  void dtype(const Argument& argument, std::initializer_list<Dtype> allowed) const;
  // Rank and extents, kAny leaving one free.
  void shape(const Argument& argument, std::initializer_list<int64_t> expected, const char* form) const;
  // A positive multiple of `multiple`, at most `most`.
  void extent(const char* argument, const char* extent, int64_t value, int64_t multiple, int64_t most) const;
  void last_dim_contiguous(const Argument& argument) const;
  // e4m3, last dim contiguous, the other strides (and on CUDA the address) multiples of 16 bytes.
  void fp8_matrix(const Argument& argument) const;
  // fp32 with one element, or not given.
  void out_scale(const Argument& argument) const;
  // Its address a multiple of its element's size; no memory (no argument, or no elements) is.
  void aligned(const Argument& argument) const;
  // All on the device of the first and aligned; none requires grad in grad mode.
  void inputs(std::initializer_list<Argument> arguments) const;
  // Written in place: on the inputs' device, no two elements in one place, disjoint from every input and other output.
  void output(const Argument& output, std::initializer_list<Argument> others) const;

 private:
  const char* op_;
};

std::string shape_of(const View& view);
std::string strides_of(const View& view);

}  // namespace mla_fp8
