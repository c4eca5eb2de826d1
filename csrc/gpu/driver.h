// The CUDA driver, resolved from libcuda.so.1 at first use: the library links no CUDA library and loads without a GPU.
// Every failure is a std::runtime_error that starts with the op's name and ends with the driver's own words.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "config/config.h"
#include "kernels/types.h"

namespace mla_fp8::cuda {

inline constexpr int kMaxDevices = 64;

struct DeviceProperties {
  Device limits;  // for select_config
  int capability_major, capability_minor;
  char name[128];
};

// Makes a device's context current while it lives, and refuses devices that the kernels do not run on. Every launcher
// begins with one.
class CurrentDevice {
 public:
  CurrentDevice(const char* op, int device_index);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

  const DeviceProperties& properties() const { return *properties_; }
  const Device& limits() const { return properties_->limits; }

  // Launches the config's kernel with `params` as its only argument, or nothing where grid_x is 0. It may start before
  // its predecessor in the stream has finished (programmatic dependent launch): every kernel waits by
  // griddepcontrol.wait. Loads the kernel at its first use on this device, also inside stream capture.
  void launch(const Config& config, const void* params, void* stream) const {
    if (config.grid_x != 0) launch(config, params, stream, config.tile->threads);
  }
  // With fewer threads a CTA than the tile has, for a kernel that says that it can.
  void launch(const Config& config, const void* params, void* stream, int threads) const;

  // Only loads the kernel. `stream` tells whether a capture is under way.
  void load(const Tile& tile, void* stream) const;

 private:
  const char* op_;
  int index_;
  const DeviceProperties* properties_;
  bool pushed_ = false;
};

// The greatest power of 2, at most 16, that divides every value: pointers and byte strides (0 for dims of extent 1).
inline int common_alignment(std::initializer_list<uint64_t> values) {
  uint64_t bits = 16;
  for (const uint64_t value : values) bits |= value;
  return static_cast<int>(bits & -bits);
}

}  // namespace mla_fp8::cuda
