#include "bindings/overlap.h"

#include <numeric>
#include <utility>

namespace mla_fp8 {
namespace {

// The bytes of a tensor: runs that begin at `begin` plus any sum of multiples of `row_bytes`.
struct Runs {
  int64_t begin, end;      // of the whole tensor
  int64_t run_bytes;       // its last dims, as far as they are contiguous
  int64_t row_bytes = 0;   // divides the strides of the other dims; 0: there are none
};

Runs runs_of(const View& view) {
  const int64_t bytes = bytes_per_element(view.dtype), begin = reinterpret_cast<int64_t>(view.data);
  Runs runs{begin, begin + bytes, bytes};
  for (int64_t i = view.dim - 1; i >= 0; --i) {
    if (view.sizes[i] == 1) continue;
    const int64_t stride_bytes = view.strides[i] * bytes;
    runs.end += stride_bytes * (view.sizes[i] - 1);
    if (runs.row_bytes == 0 && stride_bytes == runs.run_bytes) {
      runs.run_bytes *= view.sizes[i];
    } else {
      runs.row_bytes = std::gcd(runs.row_bytes, stride_bytes);
    }
  }
  return runs;
}

}  // namespace

bool share_memory(const View& a, const View& b) {
  if (!a || !b || !a.same_device(b) || a.numel() == 0 || b.numel() == 0) return false;
  Runs first = runs_of(a), second = runs_of(b);
  if (first.begin > second.begin) std::swap(first, second);
  if (first.end <= second.begin) return false;
  const int64_t row_bytes = std::gcd(first.row_bytes, second.row_bytes);
  if (row_bytes == 0) return true;
  const int64_t column = (second.begin - first.begin) % row_bytes;
  return column < first.run_bytes || column + second.run_bytes > row_bytes;
}

bool overlaps_itself(const View& view) {
  if (view.numel() == 0) return false;
  for (int64_t i = 0; i < view.dim; ++i) {
    int64_t reached = 0;  // elements past the first, by strides that are no larger
    for (int64_t j = 0; j < view.dim; ++j) {
      if (j != i && view.strides[j] <= view.strides[i]) reached += view.strides[j] * (view.sizes[j] - 1);
    }
    if (view.sizes[i] > 1 && view.strides[i] <= reached) return true;
  }
  return false;
}

}  // namespace mla_fp8
