#include "gpu/driver.h"

#include <dlfcn.h>

#include <atomic>
#include <iomanip>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "gpu/driver_abi.h"

namespace mla_fp8::cuda {

struct DeviceState {
  Device limits;
  abi::Ordinal ordinal;
  abi::Handle primary;  // retained, never released: kernels stay loaded
};

namespace {

using abi::Driver;
using abi::Handle;
using abi::Result;

// Of the data sheet's bandwidth, what a large copy reaches: 3.0 of an H100's 3.35 TB/s.
constexpr double kDramEfficiency = 0.9;

// Double data rate.
double dram_gbps(int clock_khz, int bus_bits) { return kDramEfficiency * 2 * clock_khz * (bus_bits / 8.0) / 1e6; }

// The limits that a device tells, as select_config knows them.
constexpr struct {
  const char* name;
  int Device::* limit;
  int attribute;
} kLimits[] = {
    {"num_sms", &Device::num_sms, abi::kMultiprocessorCount},
    {"smem_bytes_per_cta", &Device::smem_bytes_per_cta, abi::kMaxSharedMemoryPerBlockOptin},
    {"smem_bytes_per_sm", &Device::smem_bytes_per_sm, abi::kMaxSharedMemoryPerMultiprocessor},
    {"smem_bytes_reserved", &Device::smem_bytes_reserved, abi::kReservedSharedMemoryPerBlock},
    {"threads_per_sm", &Device::threads_per_sm, abi::kMaxThreadsPerMultiprocessor},
    {"registers_per_sm", &Device::registers_per_sm, abi::kMaxRegistersPerMultiprocessor},
    {"ctas_per_sm", &Device::ctas_per_sm, abi::kMaxBlocksPerMultiprocessor},
};

// Fails unless there are kernels for this capability: they run on no other.
void check_capability(const char* op, const Driver& driver, int capability, abi::Ordinal ordinal) {
  std::string supported;
  for (const auto& [known, gpus] : kArchitectures) {
    if (known == capability) return;
    supported += text(supported.empty() ? "" : " or ", known / 10, ".", known % 10, " (", gpus, ")");
  }
  char name[128];
  check(op, driver, driver.device_get_name(name, sizeof name, ordinal), "cuDeviceGetName");
  fail(op, text("device must have compute capability ", supported, ", got ", capability / 10, ".", capability % 10,
                " (", name, ")"));
}

// Asks the driver, and refuses a device that the kernels do not run on. Makes no context.
DeviceState ask_device(const char* op, const Driver& driver, int index) {
  DeviceState state{};
  check(op, driver, driver.device_get(&state.ordinal, index), "cuDeviceGet");
  const auto attribute = [&](int which) {
    int value = 0;
    check(op, driver, driver.device_get_attribute(&value, which, state.ordinal), "cuDeviceGetAttribute");
    return value;
  };
  state.limits.capability = 10 * attribute(abi::kComputeCapabilityMajor) + attribute(abi::kComputeCapabilityMinor);
  check_capability(op, driver, state.limits.capability, state.ordinal);
  for (const auto& [name, limit, which] : kLimits) state.limits.*limit = attribute(which);
  state.limits.l2_bytes = attribute(abi::kL2CacheSize);
  state.limits.dram_gbps = dram_gbps(attribute(abi::kMemoryClockRate), attribute(abi::kGlobalMemoryBusWidth));
  return state;
}

std::mutex mutex;  // guards writes to devices
std::atomic<const DeviceState*> devices[kMaxDevices];

const DeviceState& device_state(const char* op, const Driver& driver, int index) {
  if (index < 0 || index >= kMaxDevices) {
    fail(op, text("device index must be from 0 to ", kMaxDevices - 1, ", got ", index));
  }
  if (const DeviceState* known = devices[index].load(std::memory_order_acquire)) return *known;

  auto state = std::make_unique<DeviceState>(ask_device(op, driver, index));
  check(op, driver, driver.primary_ctx_retain(&state->primary, state->ordinal), "cuDevicePrimaryCtxRetain");
  const std::lock_guard<std::mutex> lock(mutex);
  if (const DeviceState* known = devices[index].load(std::memory_order_acquire)) return *known;
  devices[index].store(state.get(), std::memory_order_release);
  return *state.release();
}

void* find_get_proc_address(const char* op) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) fail(op, text("the CUDA driver must be installed, got ", dlerror()));
  void* function = dlsym(library, "cuGetProcAddress_v2");
  if (function != nullptr) return function;
  fail(op, "the CUDA driver must support CUDA 12.0 or later, got one without cuGetProcAddress_v2");
}

}  // namespace

abi::Driver::Driver(const char* op_) : op(op_), get_proc_address(Symbol{find_get_proc_address(op_)}) {}

abi::Driver::Symbol abi::Driver::find(const char* symbol) const {
  void* function = nullptr;
  if (get_proc_address(symbol, &function, kDriverVersion, 0, nullptr) == kSuccess && function) return {function};
  fail(op, text("the CUDA driver must support CUDA 12.0 or later, got one without ", symbol));
}

void fail(const char* op, const std::string& reason) { throw std::runtime_error(text(op, ": ", reason)); }

void check(const char* op, const Driver& driver, Result result, const std::string& what) {
  if (result == abi::kSuccess) return;
  const char* name = nullptr;
  const char* words = nullptr;
  driver.get_error_name(result, &name);
  driver.get_error_string(result, &words);
  fail(op, text(what, " failed: ", name ? name : text("CUresult ", result), words ? text(" (", words, ")") : ""));
}

const Driver& driver_for(const char* op) {
  static const Driver driver = [op] {
    const Driver resolved(op);
    check(op, resolved, resolved.init(0), "cuInit");
    return resolved;
  }();
  return driver;
}

CurrentDevice::CurrentDevice(const char* op, int device_index) : op_(op), index_(device_index) {
  const Driver& driver = driver_for(op);
  state_ = &device_state(op, driver, device_index);
  abi::Ordinal current = -1;
  const Result result = driver.ctx_get_device(&current);
  // A thread without a context gets one for good, as the CUDA runtime would give it.
  if (result == abi::kErrorInvalidContext) {
    check(op, driver, driver.ctx_set_current(state_->primary), "cuCtxSetCurrent");
  } else {
    check(op, driver, result, "cuCtxGetDevice");
    if (current != state_->ordinal) {
      check(op, driver, driver.ctx_push_current(state_->primary), "cuCtxPushCurrent");
      pushed_ = true;
    }
  }
}

CurrentDevice::~CurrentDevice() {
  Handle popped = nullptr;
  if (pushed_) driver_for(op_).ctx_pop_current(&popped);
}

const Device& CurrentDevice::limits() const { return state_->limits; }

void CurrentDevice::load(const Tile& tile, void* stream) const {
  find_kernel(op_, index_, state_->ordinal, tile, stream);
}

void CurrentDevice::launch(const Config& config, const void* params, void* stream, int threads) const {
  if (config.grid_x == 0) return;
  const Driver& driver = driver_for(op_);
  const Tile& tile = *config.tile;
  const Handle kernel = find_kernel(op_, index_, state_->ordinal, tile, stream);

  abi::LaunchAttribute dependent{abi::kLaunchProgrammaticStreamSerialization, {}, {}};
  dependent.value.programmatic_stream_serialization_allowed = 1;
  abi::LaunchConfig launch{};
  launch.grid_x = static_cast<unsigned>(config.grid_x);
  launch.block_x = static_cast<unsigned>(threads != 0 ? threads : tile.threads);
  launch.grid_y = launch.grid_z = launch.block_y = launch.block_z = launch.attribute_count = 1;
  launch.shared_bytes = static_cast<unsigned>(tile.smem_bytes);
  launch.stream = stream;
  launch.attributes = &dependent;
  void* arguments[] = {const_cast<void*>(params)};
  const Result result = driver.launch_kernel_ex(&launch, kernel, arguments, nullptr);
  if (result == abi::kSuccess) return;
  check(op_, driver, result,
        text("launch of ", tile.symbol, " with ", launch.grid_x, " CTAs of ", launch.block_x, " threads and ",
             tile.smem_bytes, " bytes"));
}

std::string describe_device(const char* op, int device_index) {
  const Device limits = ask_device(op, driver_for(op), device_index).limits;
  std::string told = text("capability=", limits.capability, " ");
  for (const auto& [name, limit, which] : kLimits) told += text(name, "=", limits.*limit, " ");
  const auto exact = std::setprecision(std::numeric_limits<double>::max_digits10);
  return text(exact, told, "l2_bytes=", limits.l2_bytes, " dram_gbps=", limits.dram_gbps);
}

}  // namespace mla_fp8::cuda
