// What the checks and kernels need of a tensor, read once through LibTorch's stable C interface.
#pragma once

#include <torch/csrc/stable/tensor_struct.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "product.h"

namespace mla_fp8 {

using Extents = std::initializer_list<int64_t>;
inline constexpr int64_t kAny = -1;  // an extent that a shape check leaves free

// Borrows a tensor: valid while that tensor lives. Strides are in elements.
struct View {
  AtenTensorHandle handle = nullptr;  // null: an optional argument that was not given
  void* data = nullptr;
  int64_t *sizes = nullptr, *strides = nullptr;
  int64_t dim = 0;
  Dtype dtype = Dtype::kOther;
  int32_t torch_dtype = 0, device_type = 0, device_index = 0;

  explicit operator bool() const { return handle != nullptr; }
  bool is_cuda() const;
  bool same_device(const View& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
  int64_t numel() const;
};

View view_of(const torch::stable::Tensor& tensor);

int bytes_per_element(Dtype dtype);
std::string name_of(Dtype dtype);
std::string name_of(const View& view);  // of its dtype
std::string device_of(const View& view);
std::string list_of(const int64_t* extents, size_t count);  // "[2, 3]"; "*" for kAny

// An uninitialized tensor on the device of `like`; contiguous in torch's sense unless strides are
// given.
torch::stable::Tensor empty(const char* op, const View& like, Dtype dtype, Extents sizes, Extents strides = {});

// Whether autograd would record an operation on it: in grad mode, if it requires a gradient. The
// stable interface has no getter for that, but an alias of a tensor that requires a gradient is not
// a leaf.
bool requires_grad(const View& view);

// Runs on PyTorch's intra-op threads.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// The stream that torch has current on this device in this thread; null is the legacy default
// stream.
void* current_stream(int device_index);

}  // namespace mla_fp8
