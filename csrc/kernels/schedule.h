// What a schedule of any architecture has: its kernel's argument, the order of its weights in
// shared memory, and its place in a line of tiles.h.
#pragma once

#include "product.h"

namespace mla_fp8 {

// The only argument of a product's kernel.
struct Params {
  TensorMap w;  // e4m3 [heads,n,k] in the schedule's order of rows, 128-byte swizzle
  Product product;
  u32 phase_slot;  // of phases.cuh
};

inline constexpr int kRegistersPerSm = 65536;
inline constexpr int kRegisterStep = 8;  // a thread gets a multiple of it

// The order in which the copy engine brings a head's weight rows to shared memory: the launcher
// makes the tensor map from it. That has dims [K, x, y, z, head], where a weight row is stride[0] x
// + stride[1] y + stride[2] z. A row that is a multiple of stride[2] begins at z = row / stride[2].
struct WeightOrder {
  int extent[2];  // of x and y; of z rows / stride[2]
  int stride[3];  // in rows
  int box[3];  // along x, y, z

  MLA_FP8_HOST_DEVICE constexpr int box_rows() const { return box[0] * box[1] * box[2]; }
  // The weight row, counted from the box's first, that stands at row i of the box in shared memory.
  MLA_FP8_HOST_DEVICE constexpr int row(int i) const {
    return i % box[0] * stride[0] + i / box[0] % box[1] * stride[1] + i / (box[0] * box[1]) * stride[2];
  }
};

// The type in parentheses: a macro's argument may hold commas only there.
template <class>
struct InParentheses;
template <class T>
struct InParentheses<void(T)> {
  using type = T;
};
#define MLA_FP8_SCHEDULE(schedule) InParentheses<void schedule>::type

}  // namespace mla_fp8
