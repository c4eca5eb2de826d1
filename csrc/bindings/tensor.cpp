#include "bindings/tensor.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor_inl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "text.h"

namespace mla_fp8 {
namespace {

constexpr size_t kMostDims = 3;  // of an output

// Dtypes in the order of Dtype, then others, which are only named.
struct KnownDtype {
  Dtype dtype;
  int32_t torch_dtype;
  const char* name;
  int bytes;
};

const std::array<KnownDtype, 11>& known_dtypes() {
  static const std::array<KnownDtype, 11> known = {{
      {Dtype::kBf16, aoti_torch_dtype_bfloat16(), "bfloat16", 2},
      {Dtype::kFp16, aoti_torch_dtype_float16(), "float16", 2},
      {Dtype::kE4m3, aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn", 1},
      {Dtype::kFp32, aoti_torch_dtype_float32(), "float32", 4},
      {Dtype::kOther, aoti_torch_dtype_float64(), "float64", 8},
      {Dtype::kOther, aoti_torch_dtype_float8_e5m2(), "float8_e5m2", 1},
      {Dtype::kOther, aoti_torch_dtype_uint8(), "uint8", 1},
      {Dtype::kOther, aoti_torch_dtype_int8(), "int8", 1},
      {Dtype::kOther, aoti_torch_dtype_int32(), "int32", 4},
      {Dtype::kOther, aoti_torch_dtype_int64(), "int64", 8},
      {Dtype::kOther, aoti_torch_dtype_bool(), "bool", 1},
  }};
  return known;
}

const KnownDtype& known_dtype(Dtype dtype) { return known_dtypes()[static_cast<size_t>(dtype)]; }

const KnownDtype* find_dtype(int32_t torch_dtype) {
  for (const KnownDtype& known : known_dtypes()) {
    if (known.torch_dtype == torch_dtype) return &known;
  }
  return nullptr;
}

}  // namespace

bool View::is_cuda() const {
  static const int32_t cuda = aoti_torch_device_type_cuda();
  return device_type == cuda;
}

int64_t View::numel() const {
  int64_t count = 1;
  for (int64_t i = 0; i < dim; ++i) count *= sizes[i];
  return count;
}

View view_of(const torch::stable::Tensor& tensor) {
  View view;
  view.handle = tensor.get();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(view.handle, &view.data));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(view.handle, &view.sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(view.handle, &view.strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(view.handle, &view.dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(view.handle, &view.torch_dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(view.handle, &view.device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(view.handle, &view.device_index));
  const KnownDtype* known = find_dtype(view.torch_dtype);
  view.dtype = known == nullptr ? Dtype::kOther : known->dtype;
  return view;
}

int bytes_per_element(Dtype dtype) { return known_dtype(dtype).bytes; }

std::string name_of(Dtype dtype) { return known_dtype(dtype).name; }

std::string name_of(const View& view) {
  const KnownDtype* known = find_dtype(view.torch_dtype);
  return known != nullptr ? known->name : text("torch dtype number ", view.torch_dtype);
}

std::string device_of(const View& view) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  if (view.device_type == cpu) return "cpu";
  return text(view.is_cuda() ? "cuda" : text("device type ", view.device_type), ":", view.device_index);
}

std::string list_of(const int64_t* extents, size_t count) {
  std::string told;
  for (size_t i = 0; i < count; ++i) told += text(i > 0 ? ", " : "", extents[i] == kAny ? "*" : text(extents[i]));
  return text("[", told, "]");
}

torch::stable::Tensor empty(const char* op, const View& like, Dtype dtype, Extents sizes, Extents strides) {
  int64_t contiguous[kMostDims], stride = 1;
  bool countable = true;
  for (size_t i = sizes.size(); i-- > 0;) {
    contiguous[i] = stride;
    // A dim of extent 0 counts as 1, as in torch, so that fakes agree on empty tensors.
    countable &= !__builtin_mul_overflow(stride, std::max<int64_t>(sizes.begin()[i], 1), &stride);
  }
  AtenTensorHandle handle;
  if (countable &&
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                               strides.size() == 0 ? contiguous : strides.begin(), known_dtype(dtype).torch_dtype,
                               like.device_type, like.device_index, &handle) == AOTI_TORCH_SUCCESS) {
    return torch::stable::Tensor(handle);
  }
  throw std::runtime_error(text(op, ": the result must fit into the memory of ", device_of(like), ", got shape ",
                                list_of(sizes.begin(), sizes.size()), " of ", name_of(dtype), " (out of memory)"));
}

bool requires_grad(const View& view) {
  if (!aoti_torch_grad_mode_is_enabled()) return false;
  AtenTensorHandle owned;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(view.handle, &owned));
  std::array<StableIValue, 1> stack{torch::stable::detail::from(torch::stable::Tensor(owned))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::alias", "", stack.data(), TORCH_ABI_VERSION));
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_leaf", "", stack.data(), TORCH_ABI_VERSION));
  return !torch::stable::detail::to<bool>(stack[0]);
}

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context),
                  void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

void* current_stream(int device_index) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    if (symbol == nullptr)
      throw std::runtime_error("mla_fp8: torch must have CUDA (libtorch_cuda.so), got one without");
    return reinterpret_cast<GetStream>(symbol);
  }();
  void* stream = nullptr;
  if (get_stream(device_index, &stream) != 0) throw std::runtime_error("mla_fp8: torch gave no current CUDA stream");
  return stream;
}

}  // namespace mla_fp8
