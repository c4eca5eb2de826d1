#include "bindings/op.h"

namespace mla_fp8::ops {

void check_activation(const Checks& check, const Argument& x, const char* form, const char* extent) {
  check.rank(x, 3, form);
  check.dtype(x, {Dtype::kBf16, Dtype::kFp16});
  if (x.view.sizes[0] > kMaxRows) {
    check.fail(x.name, "have at most " + std::to_string(kMaxRows) + " rows", shape_of(x.view));
  }
  if (x.view.sizes[1] < 1) check.fail(x.name, "have at least one head", shape_of(x.view));
  check.extent(x.name, extent, x.view.sizes[2], kScaleGroup, kMaxExtent);
  check.last_dim_contiguous(x);
}

void check_weight(const Checks& check, const Argument& w, const Argument& w_scale, int64_t heads, int64_t k,
                  const char* form, const char* extent, const char* scale_form) {
  check.shape(w, {heads, kAny, k}, form);
  check.extent(w.name, extent, w.view.sizes[1], kScaleGroup, kMaxExtent);
  check.fp8_matrix(w);
  check.dtype(w_scale, {Dtype::kFp32});
  check.shape(w_scale, {heads, w.view.sizes[1] / kScaleGroup, k / kScaleGroup}, scale_form);
}

}  // namespace mla_fp8::ops
