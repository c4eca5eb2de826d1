#include "gpu/driver.h"

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "gpu/driver_abi.h"

namespace mla_fp8::cuda {
namespace {

using abi::Driver;
using abi::Handle;
using abi::Result;

constexpr int kCapabilityMajor = 9, kCapabilityMinor = 0;  // sm_90a code runs nowhere else
constexpr double kDramEfficiency = 0.9;  // of the data sheet's bandwidth, in a large copy: 3.0 of an H100's 3.35 TB/s

// Double data rate.
double dram_gbps(int clock_khz, int bus_bits) { return kDramEfficiency * 2 * clock_khz * (bus_bits / 8.0) / 1e6; }

Driver resolve_driver(const char* op) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) fail(op, std::string("the CUDA driver must be installed, got ") + dlerror());
  using GetProcAddress = Result (*)(const char*, void**, int, uint64_t, int*);
  const auto get = reinterpret_cast<GetProcAddress>(dlsym(library, "cuGetProcAddress_v2"));
  if (get == nullptr) fail(op, "the CUDA driver must support CUDA 12.0 or later, got one without cuGetProcAddress_v2");

  Driver driver{};
  const auto find = [&](const char* symbol, void** function) {
    if (get(symbol, function, abi::kDriverVersion, 0, nullptr) != abi::kSuccess || *function == nullptr) {
      fail(op, std::string("the CUDA driver must support CUDA 12.0 or later, got one without ") + symbol);
    }
  };
#define MLA_FP8_FIND(member, symbol, ...) find(#symbol, reinterpret_cast<void**>(&driver.member));
  MLA_FP8_DRIVER_FUNCTIONS(MLA_FP8_FIND)
#undef MLA_FP8_FIND
  return driver;
}

struct DeviceState {
  DeviceProperties properties;
  abi::Ordinal ordinal;
  Handle primary;  // retained, never released: kernels stay loaded
};

std::mutex mutex;  // guards writes to devices
std::atomic<const DeviceState*> devices[kMaxDevices];

const DeviceState& device_state(const char* op, const Driver& driver, int index) {
  if (index < 0 || index >= kMaxDevices) {
    fail(op, "device index must be from 0 to " + std::to_string(kMaxDevices - 1) + ", got " + std::to_string(index));
  }
  if (const DeviceState* known = devices[index].load(std::memory_order_acquire)) return *known;

  auto state = std::make_unique<DeviceState>();
  check(op, driver, driver.device_get(&state->ordinal, index), "cuDeviceGet");
  const auto attribute = [&](int which) {
    int value = 0;
    check(op, driver, driver.device_get_attribute(&value, which, state->ordinal), "cuDeviceGetAttribute");
    return value;
  };
  DeviceProperties& properties = state->properties;
  check(op, driver, driver.device_get_name(properties.name, sizeof properties.name, state->ordinal), "cuDeviceGetName");
  properties.capability_major = attribute(abi::kComputeCapabilityMajor);
  properties.capability_minor = attribute(abi::kComputeCapabilityMinor);
  properties.limits.num_sms = attribute(abi::kMultiprocessorCount);
  properties.limits.smem_bytes_per_cta = attribute(abi::kMaxSharedMemoryPerBlockOptin);
  properties.limits.smem_bytes_per_sm = attribute(abi::kMaxSharedMemoryPerMultiprocessor);
  properties.limits.smem_bytes_reserved = attribute(abi::kReservedSharedMemoryPerBlock);
  properties.limits.threads_per_sm = attribute(abi::kMaxThreadsPerMultiprocessor);
  properties.limits.registers_per_sm = attribute(abi::kMaxRegistersPerMultiprocessor);
  properties.limits.ctas_per_sm = attribute(abi::kMaxBlocksPerMultiprocessor);
  properties.limits.l2_bytes = attribute(abi::kL2CacheSize);
  properties.limits.dram_gbps = dram_gbps(attribute(abi::kMemoryClockRate), attribute(abi::kGlobalMemoryBusWidth));
  if (properties.capability_major != kCapabilityMajor || properties.capability_minor != kCapabilityMinor) {
    fail(op, "device must have compute capability 9.0 (H100, H200), got " +
                 std::to_string(properties.capability_major) + "." + std::to_string(properties.capability_minor) +
                 " (" + properties.name + ")");
  }
  check(op, driver, driver.primary_ctx_retain(&state->primary, state->ordinal), "cuDevicePrimaryCtxRetain");

  const std::lock_guard<std::mutex> lock(mutex);
  if (const DeviceState* known = devices[index].load(std::memory_order_acquire)) return *known;
  devices[index].store(state.get(), std::memory_order_release);
  return *state.release();
}

}  // namespace

void fail(const char* op, const std::string& reason) { throw std::runtime_error(op + (": " + reason)); }

void check(const char* op, const Driver& driver, Result result, const std::string& what) {
  if (result == abi::kSuccess) return;
  const char* name = nullptr;
  const char* text = nullptr;
  driver.get_error_name(result, &name);
  driver.get_error_string(result, &text);
  fail(op, what + " failed: " + (name ? name : "CUresult " + std::to_string(result)) +
               (text ? std::string(" (") + text + ")" : ""));
}

const Driver& driver_for(const char* op) {
  static const Driver driver = [op] {
    Driver resolved = resolve_driver(op);
    check(op, resolved, resolved.init(0), "cuInit");
    return resolved;
  }();
  return driver;
}

CurrentDevice::CurrentDevice(const char* op, int device_index) : op_(op), index_(device_index) {
  const Driver& driver = driver_for(op);
  const DeviceState& state = device_state(op, driver, device_index);
  properties_ = &state.properties;
  abi::Ordinal current = -1;
  const Result result = driver.ctx_get_device(&current);
  if (result == abi::kErrorInvalidContext) {  // this thread has none: give it one for good, as the CUDA runtime would
    check(op, driver, driver.ctx_set_current(state.primary), "cuCtxSetCurrent");
  } else {
    check(op, driver, result, "cuCtxGetDevice");
    if (current != state.ordinal) {
      check(op, driver, driver.ctx_push_current(state.primary), "cuCtxPushCurrent");
      pushed_ = true;
    }
  }
}

CurrentDevice::~CurrentDevice() {
  Handle popped = nullptr;
  if (pushed_) driver_for(op_).ctx_pop_current(&popped);
}

void CurrentDevice::load(const Tile& tile, void* stream) const {
  find_kernel(op_, index_, device_state(op_, driver_for(op_), index_).ordinal, tile, stream);
}

void CurrentDevice::launch(const Config& config, const void* params, void* stream, int threads) const {
  if (config.grid_x == 0) return;
  const Driver& driver = driver_for(op_);
  const Tile& tile = *config.tile;
  const Handle kernel = find_kernel(op_, index_, device_state(op_, driver, index_).ordinal, tile, stream);

  abi::LaunchAttribute dependent{abi::kLaunchProgrammaticStreamSerialization, {}, {}};
  dependent.value.programmatic_stream_serialization_allowed = 1;
  const abi::LaunchConfig launch{static_cast<unsigned>(config.grid_x),
                                 1,
                                 1,
                                 static_cast<unsigned>(threads),
                                 1,
                                 1,
                                 static_cast<unsigned>(tile.smem_bytes),
                                 stream,
                                 &dependent,
                                 1};
  void* arguments[] = {const_cast<void*>(params)};
  const Result result = driver.launch_kernel_ex(&launch, kernel, arguments, nullptr);
  if (result != abi::kSuccess) {
    check(op_, driver, result,
          std::string("launch of ") + tile.symbol + " with " + std::to_string(config.grid_x) + " CTAs of " +
              std::to_string(threads) + " threads and " + std::to_string(tile.smem_bytes) + " bytes");
  }
}

}  // namespace mla_fp8::cuda
