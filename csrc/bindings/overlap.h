// Whether strided tensors may share memory. Two are known to be disjoint where their byte ranges
// are, or where they are separate columns of rows of one length, as `q[..., :512]` and
// `q[..., 512:]` are. One tensor is known not to overlap itself where every stride steps over all
// that the smaller ones reach. What these rules cannot prove is refused.
#pragma once

#include "bindings/tensor.h"

namespace mla_fp8 {

// Some byte may belong to both.
bool share_memory(const View& a, const View& b);

// Two elements of one tensor may share a byte, as in an expanded one.
bool overlaps_itself(const View& view);

}  // namespace mla_fp8
