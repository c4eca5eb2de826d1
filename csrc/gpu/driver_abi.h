// For driver.cpp and images.cpp alone: the part of the CUDA driver's ABI that they use, declared here so that a build
// needs no cuda.h. Where cuda.h is at hand, every value and layout is compared with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#if __has_include(<cuda.h>)
#include <cuda.h>
#endif

#include "config/tile.h"

namespace mla_fp8::cuda::abi {

using Result = int;  // CUresult
using Handle = void*;  // CUcontext, CUstream, CUlibrary, CUkernel, CUfunction
using Ordinal = int;  // CUdevice

inline constexpr int kDriverVersion = 12000;  // the ABI asked for: CUDA 12.0, which brought libraries and tensor maps

enum : Result {
  kSuccess = 0,
  kErrorInvalidImage = 200,
  kErrorInvalidContext = 201,
  kErrorNoBinaryForGpu = 209,
  kErrorInvalidPtx = 218,
  kErrorJitCompilerNotFound = 221,
  kErrorUnsupportedPtxVersion = 222,
  kErrorStreamCaptureImplicit = 906,
};

enum DeviceAttribute : int {
  kMultiprocessorCount = 16,
  kMemoryClockRate = 36,  // kHz
  kGlobalMemoryBusWidth = 37,  // bits
  kL2CacheSize = 38,
  kMaxThreadsPerMultiprocessor = 39,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kMaxSharedMemoryPerMultiprocessor = 81,
  kMaxRegistersPerMultiprocessor = 82,
  kMaxSharedMemoryPerBlockOptin = 97,
  kMaxBlocksPerMultiprocessor = 106,
  kReservedSharedMemoryPerBlock = 111,
};

inline constexpr int kFunctionMaxDynamicSharedSizeBytes = 8;
inline constexpr int kLaunchProgrammaticStreamSerialization = 6;
inline constexpr int kCaptureModeRelaxed = 2;
inline constexpr int kCaptureNone = 0;
inline constexpr int kL2Promotion256Bytes = 3;

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

// X(member, driver symbol, argument types): every function returns Result.
#define MLA_FP8_DRIVER_FUNCTIONS(X)                                                                               \
  X(init, cuInit, unsigned)                                                                                       \
  X(get_error_name, cuGetErrorName, Result, const char**)                                                         \
  X(get_error_string, cuGetErrorString, Result, const char**)                                                     \
  X(device_get, cuDeviceGet, Ordinal*, int)                                                                       \
  X(device_get_name, cuDeviceGetName, char*, int, Ordinal)                                                        \
  X(device_get_attribute, cuDeviceGetAttribute, int*, int, Ordinal)                                               \
  X(primary_ctx_retain, cuDevicePrimaryCtxRetain, Handle*, Ordinal)                                               \
  X(ctx_get_device, cuCtxGetDevice, Ordinal*)                                                                     \
  X(ctx_set_current, cuCtxSetCurrent, Handle)                                                                     \
  X(ctx_push_current, cuCtxPushCurrent, Handle)                                                                   \
  X(ctx_pop_current, cuCtxPopCurrent, Handle*)                                                                    \
  X(exchange_capture_mode, cuThreadExchangeStreamCaptureMode, int*)                                               \
  X(stream_is_capturing, cuStreamIsCapturing, Handle, int*)                                                       \
  X(library_load_data, cuLibraryLoadData, Handle*, const void*, void*, void**, unsigned, void*, void**, unsigned) \
  X(library_get_kernel, cuLibraryGetKernel, Handle*, Handle, const char*)                                         \
  X(kernel_get_function, cuKernelGetFunction, Handle*, Handle)                                                    \
  X(kernel_set_attribute, cuKernelSetAttribute, int, int, Handle, Ordinal)                                        \
  X(launch_kernel_ex, cuLaunchKernelEx, const LaunchConfig*, Handle, void**, void**)                              \
  X(tensor_map_encode_tiled, cuTensorMapEncodeTiled, void*, uint32_t, uint32_t, const void*, const uint64_t*,     \
    const uint64_t*, const uint32_t*, const uint32_t*, uint32_t, uint32_t, uint32_t, uint32_t)

struct Driver {
#define MLA_FP8_MEMBER(member, symbol, ...) Result (*member)(__VA_ARGS__);
  MLA_FP8_DRIVER_FUNCTIONS(MLA_FP8_MEMBER)
#undef MLA_FP8_MEMBER
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
#define MLA_FP8_SAME(own, cuda) static_assert(static_cast<int>(own) == static_cast<int>(cuda))
MLA_FP8_SAME(kErrorInvalidImage, CUDA_ERROR_INVALID_IMAGE);
MLA_FP8_SAME(kErrorInvalidContext, CUDA_ERROR_INVALID_CONTEXT);
MLA_FP8_SAME(kErrorNoBinaryForGpu, CUDA_ERROR_NO_BINARY_FOR_GPU);
MLA_FP8_SAME(kErrorInvalidPtx, CUDA_ERROR_INVALID_PTX);
MLA_FP8_SAME(kErrorJitCompilerNotFound, CUDA_ERROR_JIT_COMPILER_NOT_FOUND);
MLA_FP8_SAME(kErrorUnsupportedPtxVersion, CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
MLA_FP8_SAME(kErrorStreamCaptureImplicit, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
MLA_FP8_SAME(kMultiprocessorCount, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
MLA_FP8_SAME(kMemoryClockRate, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE);
MLA_FP8_SAME(kGlobalMemoryBusWidth, CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
MLA_FP8_SAME(kL2CacheSize, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
MLA_FP8_SAME(kMaxThreadsPerMultiprocessor, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
MLA_FP8_SAME(kComputeCapabilityMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
MLA_FP8_SAME(kComputeCapabilityMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
MLA_FP8_SAME(kMaxSharedMemoryPerMultiprocessor, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
MLA_FP8_SAME(kMaxRegistersPerMultiprocessor, CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR);
MLA_FP8_SAME(kMaxSharedMemoryPerBlockOptin, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
MLA_FP8_SAME(kMaxBlocksPerMultiprocessor, CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
MLA_FP8_SAME(kReservedSharedMemoryPerBlock, CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK);
MLA_FP8_SAME(kFunctionMaxDynamicSharedSizeBytes, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
MLA_FP8_SAME(kLaunchProgrammaticStreamSerialization, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
MLA_FP8_SAME(kCaptureModeRelaxed, CU_STREAM_CAPTURE_MODE_RELAXED);
MLA_FP8_SAME(kCaptureNone, CU_STREAM_CAPTURE_STATUS_NONE);
MLA_FP8_SAME(kL2Promotion256Bytes, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
#undef MLA_FP8_SAME
#endif

}  // namespace mla_fp8::cuda::abi

namespace mla_fp8::cuda {

// The driver, initialized. An exception leaves it to be tried again.
const abi::Driver& driver_for(const char* op);

[[noreturn]] void fail(const char* op, const std::string& reason);

// Throws `<op>: <what> failed: <the driver's name of the error> (<its text>)`.
void check(const char* op, const abi::Driver& driver, abi::Result result, const std::string& what);

// The tile's kernel on this device, whose context is current. `stream` tells whether a capture is under way.
abi::Handle find_kernel(const char* op, int device_index, abi::Ordinal device, const Tile& tile, abi::Handle stream);

}  // namespace mla_fp8::cuda
