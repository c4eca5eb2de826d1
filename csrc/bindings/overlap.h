// Whether strided tensors share memory. Exact, so that q[..., :512] may be written beside q[..., 512:].
#pragma once

#include "bindings/tensor.h"

namespace mla_fp8 {

// Some byte belongs to both.
bool share_memory(const View& a, const View& b);

// Two elements of one tensor share a byte, as in an expanded one.
bool overlaps_itself(const View& view);

}  // namespace mla_fp8
