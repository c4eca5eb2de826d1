// For driver.cpp and images.cpp alone: the part of the CUDA driver's ABI that they use, declared
// here so that a build needs no cuda.h. Where cuda.h is at hand, every value and layout is compared
// with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#if __has_include(<cuda.h>)
#include <cuda.h>
#endif

#include "config/tile.h"
#include "text.h"

namespace mla_fp8::cuda::abi {

using Result = int;  // CUresult
using Handle = void*;  // CUcontext, CUstream, CUlibrary, CUkernel, CUfunction
using Ordinal = int;  // CUdevice

// The ABI asked for: CUDA 12.0, which brought libraries and tensor maps.
inline constexpr int kDriverVersion = 12000;

#ifdef CUDA_VERSION
#define MLA_FP8_CUDA_VALUE(own, value, cuda) \
  inline constexpr int own = value;          \
  static_assert(own == static_cast<int>(cuda))
#else
#define MLA_FP8_CUDA_VALUE(own, value, cuda) inline constexpr int own = value
#endif
MLA_FP8_CUDA_VALUE(kSuccess, 0, CUDA_SUCCESS);
MLA_FP8_CUDA_VALUE(kErrorInvalidImage, 200, CUDA_ERROR_INVALID_IMAGE);
MLA_FP8_CUDA_VALUE(kErrorInvalidContext, 201, CUDA_ERROR_INVALID_CONTEXT);
MLA_FP8_CUDA_VALUE(kErrorNoBinaryForGpu, 209, CUDA_ERROR_NO_BINARY_FOR_GPU);
MLA_FP8_CUDA_VALUE(kErrorInvalidPtx, 218, CUDA_ERROR_INVALID_PTX);
MLA_FP8_CUDA_VALUE(kErrorJitCompilerNotFound, 221, CUDA_ERROR_JIT_COMPILER_NOT_FOUND);
MLA_FP8_CUDA_VALUE(kErrorUnsupportedPtxVersion, 222, CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
MLA_FP8_CUDA_VALUE(kErrorStreamCaptureImplicit, 906, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
// Attributes of a device; the clock rate in kHz, the bus width in bits.
MLA_FP8_CUDA_VALUE(kMultiprocessorCount, 16, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
MLA_FP8_CUDA_VALUE(kMemoryClockRate, 36, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE);
MLA_FP8_CUDA_VALUE(kGlobalMemoryBusWidth, 37, CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
MLA_FP8_CUDA_VALUE(kL2CacheSize, 38, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
MLA_FP8_CUDA_VALUE(kMaxThreadsPerMultiprocessor, 39, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
MLA_FP8_CUDA_VALUE(kComputeCapabilityMajor, 75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
MLA_FP8_CUDA_VALUE(kComputeCapabilityMinor, 76, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
MLA_FP8_CUDA_VALUE(kMaxSharedMemoryPerMultiprocessor, 81, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
MLA_FP8_CUDA_VALUE(kMaxRegistersPerMultiprocessor, 82, CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR);
MLA_FP8_CUDA_VALUE(kMaxSharedMemoryPerBlockOptin, 97, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
MLA_FP8_CUDA_VALUE(kMaxBlocksPerMultiprocessor, 106, CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
MLA_FP8_CUDA_VALUE(kReservedSharedMemoryPerBlock, 111, CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK);
MLA_FP8_CUDA_VALUE(kFunctionMaxDynamicSharedSizeBytes, 8, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
MLA_FP8_CUDA_VALUE(kLaunchProgrammaticStreamSerialization, 6, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
MLA_FP8_CUDA_VALUE(kCaptureModeRelaxed, 2, CU_STREAM_CAPTURE_MODE_RELAXED);
MLA_FP8_CUDA_VALUE(kCaptureNone, 0, CU_STREAM_CAPTURE_STATUS_NONE);
MLA_FP8_CUDA_VALUE(kTensorMapU8, 0, CU_TENSOR_MAP_DATA_TYPE_UINT8);
MLA_FP8_CUDA_VALUE(kTensorMapSwizzle128Bytes, 3, CU_TENSOR_MAP_SWIZZLE_128B);
MLA_FP8_CUDA_VALUE(kL2Promotion256Bytes, 3, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
#undef MLA_FP8_CUDA_VALUE

struct LaunchAttribute {
  int id;
  char padding[4];
  union {
    char bytes[64];
    int programmatic_stream_serialization_allowed;
  } value;
};

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  Handle stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

// The driver's functions: made, each is there. Throws what driver.cpp says of a driver that is
// missing or too old.
struct Driver {
  struct Symbol {
    void* address;
    template <typename F>
    operator F*() const {
      return reinterpret_cast<F*>(address);
    }
  };
  explicit Driver(const char* op);
  Symbol find(const char* symbol) const;

  const char* op;
  Result (*get_proc_address)(const char*, void**, int, uint64_t, int*);
  Result (*init)(unsigned) = find("cuInit");
  Result (*get_error_name)(Result, const char**) = find("cuGetErrorName");
  Result (*get_error_string)(Result, const char**) = find("cuGetErrorString");
  Result (*device_get)(Ordinal*, int) = find("cuDeviceGet");
  Result (*device_get_name)(char*, int, Ordinal) = find("cuDeviceGetName");
  Result (*device_get_attribute)(int*, int, Ordinal) = find("cuDeviceGetAttribute");
  Result (*primary_ctx_retain)(Handle*, Ordinal) = find("cuDevicePrimaryCtxRetain");
  Result (*ctx_get_device)(Ordinal*) = find("cuCtxGetDevice");
  Result (*ctx_set_current)(Handle) = find("cuCtxSetCurrent");
  Result (*ctx_push_current)(Handle) = find("cuCtxPushCurrent");
  Result (*ctx_pop_current)(Handle*) = find("cuCtxPopCurrent");
  Result (*exchange_capture_mode)(int*) = find("cuThreadExchangeStreamCaptureMode");
  Result (*stream_is_capturing)(Handle, int*) = find("cuStreamIsCapturing");
  Result (*library_load_data)(Handle*, const void*, void*, void**, unsigned, void*, void**,
                              unsigned) = find("cuLibraryLoadData");
  Result (*library_get_kernel)(Handle*, Handle, const char*) = find("cuLibraryGetKernel");
  Result (*kernel_get_function)(Handle*, Handle) = find("cuKernelGetFunction");
  Result (*kernel_set_attribute)(int, int, Handle, Ordinal) = find("cuKernelSetAttribute");
  Result (*launch_kernel_ex)(const LaunchConfig*, Handle, void**, void**) = find("cuLaunchKernelEx");
  Result (*tensor_map_encode_tiled)(void*, uint32_t, uint32_t, const void*, const uint64_t*, const uint64_t*,
                                    const uint32_t*, const uint32_t*, uint32_t, uint32_t, uint32_t,
                                    uint32_t) = find("cuTensorMapEncodeTiled");
};

#ifdef CUDA_VERSION
static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute) && alignof(CUlaunchAttribute) <= 8);
static_assert(offsetof(LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));
static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(LaunchConfig, attribute_count) == offsetof(CUlaunchConfig, numAttrs));
static_assert(sizeof(CUtensorMap) == 128 && sizeof(CUresult) == sizeof(Result) && sizeof(CUdevice) == sizeof(Ordinal));
#endif

}  // namespace mla_fp8::cuda::abi

namespace mla_fp8::cuda {

// The driver, initialized. An exception leaves it to be tried again.
const abi::Driver& driver_for(const char* op);

[[noreturn]] void fail(const char* op, const std::string& reason);

// Throws `<op>: <what> failed: <the driver's name of the error> (<its text>)`.
void check(const char* op, const abi::Driver& driver, abi::Result result, const std::string& what);

// The tile's kernel on this device, whose context is current. `stream` tells whether a capture is
// under way.
abi::Handle find_kernel(const char* op, int device_index, abi::Ordinal device, const Tile& tile, abi::Handle stream);

}  // namespace mla_fp8::cuda
