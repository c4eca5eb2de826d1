#include "bindings/tensor.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor_inl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>

namespace mla_fp8 {
namespace {

constexpr size_t kMostDims = 3;  // of an output

struct TorchDtypes {
  int32_t bf16 = aoti_torch_dtype_bfloat16();
  int32_t fp16 = aoti_torch_dtype_float16();
  int32_t e4m3 = aoti_torch_dtype_float8_e4m3fn();
  int32_t fp32 = aoti_torch_dtype_float32();
};

const TorchDtypes& torch_dtypes() {
  static const TorchDtypes dtypes;
  return dtypes;
}

Dtype dtype_from_torch(int32_t torch_dtype) {
  const TorchDtypes& known = torch_dtypes();
  if (torch_dtype == known.bf16) return Dtype::kBf16;
  if (torch_dtype == known.fp16) return Dtype::kFp16;
  if (torch_dtype == known.e4m3) return Dtype::kE4m3;
  if (torch_dtype == known.fp32) return Dtype::kFp32;
  return Dtype::kOther;
}

int32_t dtype_to_torch(Dtype dtype) {
  const TorchDtypes& known = torch_dtypes();
  switch (dtype) {
    case Dtype::kBf16:
      return known.bf16;
    case Dtype::kFp16:
      return known.fp16;
    case Dtype::kE4m3:
      return known.e4m3;
    default:
      return known.fp32;
  }
}

torch::stable::Tensor allocate(const char* op, const View& like, Dtype dtype, std::initializer_list<int64_t> sizes,
                               const int64_t* strides) {
  AtenTensorHandle handle;
  const AOTITorchError error =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype_to_torch(dtype),
                               like.device_type, like.device_index, &handle);
  if (error == AOTI_TORCH_SUCCESS) return torch::stable::Tensor(handle);
  std::string shape;
  for (int64_t size : sizes) shape += (shape.empty() ? "[" : ", ") + std::to_string(size);
  throw std::runtime_error(std::string(op) + ": the result must fit into the memory of " + device_of(like) +
                           ", got shape " + shape + "] of " + name_of(dtype) + " (out of memory)");
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
  int64_t *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(view.handle, &view.data));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(view.handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(view.handle, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(view.handle, &view.dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(view.handle, &view.torch_dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(view.handle, &view.device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(view.handle, &view.device_index));
  view.sizes = sizes;
  view.strides = strides;
  view.dtype = dtype_from_torch(view.torch_dtype);
  return view;
}

int64_t bytes_per_element(Dtype dtype) {
  switch (dtype) {
    case Dtype::kE4m3:
      return 1;
    case Dtype::kFp32:
      return 4;
    default:
      return 2;
  }
}

std::string name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBf16:
      return "bfloat16";
    case Dtype::kFp16:
      return "float16";
    case Dtype::kE4m3:
      return "float8_e4m3fn";
    case Dtype::kFp32:
      return "float32";
    default:
      return "another dtype";
  }
}

std::string name_of(const View& view) {
  if (view.dtype != Dtype::kOther) return name_of(view.dtype);
  static const std::pair<int32_t, const char*> others[] = {
      {aoti_torch_dtype_float64(), "float64"}, {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
      {aoti_torch_dtype_uint8(), "uint8"},     {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_int32(), "int32"},     {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_bool(), "bool"},
  };
  for (const auto& [torch_dtype, name] : others) {
    if (view.torch_dtype == torch_dtype) return name;
  }
  return "torch dtype number " + std::to_string(view.torch_dtype);
}

std::string device_of(const View& view) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  if (view.device_type == cpu) return "cpu";
  const std::string type = view.is_cuda() ? "cuda" : "device type " + std::to_string(view.device_type);
  return type + ":" + std::to_string(view.device_index);
}

torch::stable::Tensor empty_strided(const char* op, const View& like, Dtype dtype, std::initializer_list<int64_t> sizes,
                                    std::initializer_list<int64_t> strides) {
  return allocate(op, like, dtype, sizes, strides.begin());
}

torch::stable::Tensor empty(const char* op, const View& like, Dtype dtype, std::initializer_list<int64_t> sizes) {
  std::array<int64_t, kMostDims> strides;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    if (i > 0) stride *= std::max<int64_t>(sizes.begin()[i], 1);  // as torch does, so that fakes agree on empty tensors
  }
  return allocate(op, like, dtype, sizes, strides.data());
}

bool requires_grad(const View& view) {
  AtenTensorHandle owned;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(view.handle, &owned));
  std::array<StableIValue, 1> stack{torch::stable::detail::from(torch::stable::Tensor(owned))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::alias", "", stack.data(), TORCH_ABI_VERSION));
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_leaf", "", stack.data(), TORCH_ABI_VERSION));
  return !torch::stable::detail::to<bool>(stack[0]);
}

bool grad_mode_is_enabled() { return aoti_torch_grad_mode_is_enabled(); }

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
