// A CUDA driver that only keeps a record, for tests of what mla_fp8 asks of the real one. FAKE_*
// environment variables choose what it refuses; every call that matters is a line of standard
// output.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

constexpr int kSuccess = 0, kInvalidContext = 201, kNoBinaryForGpu = 209, kNotFound = 500;
constexpr unsigned char kElfMagic[] = {0x7f, 'E', 'L', 'F'};
thread_local bool has_context = false;
char some_object;

const char* setting(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

int record(const char* call, const std::string& detail = "") {
  std::printf("%s %s\n", call, detail.c_str());
  std::fflush(stdout);
  return std::strcmp(setting("FAKE_FAIL"), call) == 0 ? kNotFound : kSuccess;
}

int init(unsigned) { return record("cuInit"); }
int get_error_name(int, const char** name) { return *name = "CUDA_ERROR_FAKE", kSuccess; }
int get_error_string(int, const char** text) { return *text = "fake text", kSuccess; }
int device_get(int* device, int index) { return *device = index, record("cuDeviceGet"); }
int device_get_name(char* name, int size, int) { return std::snprintf(name, size, "Fake GPU"), kSuccess; }
int device_get_attribute(int* value, int which, int) {
  const int capability = std::atoi(setting("FAKE_CAPABILITY"));
  *value = which == 75 ? capability / 10 : which == 76 ? capability % 10 : 1000;
  return kSuccess;
}
int primary_ctx_retain(void** context, int) { return *context = &some_object, record("cuDevicePrimaryCtxRetain"); }
int ctx_get_device(int* device) { return *device = 0, has_context ? kSuccess : kInvalidContext; }
int ctx_set_current(void*) { return has_context = true, record("cuCtxSetCurrent"); }
int ctx_push_current(void*) { return record("cuCtxPushCurrent"); }
int ctx_pop_current(void**) { return record("cuCtxPopCurrent"); }
int exchange_capture_mode(int* mode) {
  record("cuThreadExchangeStreamCaptureMode", std::to_string(*mode));
  return *mode = 2 - *mode, kSuccess;
}
int stream_is_capturing(void*, int* status) { return *status = std::atoi(setting("FAKE_CAPTURING")), kSuccess; }
int library_load_data(void** library, const void* image, void*, void**, unsigned, void*, void**, unsigned) {
  *library = &some_object;
  const bool is_cubin = std::memcmp(image, kElfMagic, sizeof kElfMagic) == 0;
  record("cuLibraryLoadData", is_cubin ? "cubin" : "fatbin");
  return is_cubin ? kSuccess : kNoBinaryForGpu;  // as a driver older than the toolkit does
}
int library_get_kernel(void** kernel, void*, const char* symbol) {
  *kernel = &some_object;
  return record("cuLibraryGetKernel", symbol);
}
int kernel_get_function(void** function, void*) { return *function = &some_object, record("cuKernelGetFunction"); }
int kernel_set_attribute(int which, int value, void*, int) {
  return record("cuKernelSetAttribute", std::to_string(which) + " " + std::to_string(value));
}
int not_called() { std::abort(); }

const struct {
  const char* name;
  void* function;
} kFunctions[] = {
    {"cuInit", reinterpret_cast<void*>(init)},
    {"cuGetErrorName", reinterpret_cast<void*>(get_error_name)},
    {"cuGetErrorString", reinterpret_cast<void*>(get_error_string)},
    {"cuDeviceGet", reinterpret_cast<void*>(device_get)},
    {"cuDeviceGetName", reinterpret_cast<void*>(device_get_name)},
    {"cuDeviceGetAttribute", reinterpret_cast<void*>(device_get_attribute)},
    {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(primary_ctx_retain)},
    {"cuCtxGetDevice", reinterpret_cast<void*>(ctx_get_device)},
    {"cuCtxSetCurrent", reinterpret_cast<void*>(ctx_set_current)},
    {"cuCtxPushCurrent", reinterpret_cast<void*>(ctx_push_current)},
    {"cuCtxPopCurrent", reinterpret_cast<void*>(ctx_pop_current)},
    {"cuThreadExchangeStreamCaptureMode", reinterpret_cast<void*>(exchange_capture_mode)},
    {"cuStreamIsCapturing", reinterpret_cast<void*>(stream_is_capturing)},
    {"cuLibraryLoadData", reinterpret_cast<void*>(library_load_data)},
    {"cuLibraryGetKernel", reinterpret_cast<void*>(library_get_kernel)},
    {"cuKernelGetFunction", reinterpret_cast<void*>(kernel_get_function)},
    {"cuKernelSetAttribute", reinterpret_cast<void*>(kernel_set_attribute)},
    {"cuLaunchKernelEx", reinterpret_cast<void*>(not_called)},
    {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(not_called)},
};

}  // namespace

extern "C" int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int*) {
  *function = nullptr;
  if (std::strcmp(setting("FAKE_MISSING"), name) == 0) return kNotFound;
  for (const auto& known : kFunctions) {
    if (std::strcmp(known.name, name) == 0) *function = known.function;
  }
  return *function == nullptr ? kNotFound : kSuccess;
}
