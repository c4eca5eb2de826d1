// The CUDA driver, resolved from libcuda.so.1 at first use: the library links no CUDA library and
// loads without a GPU. Every failure is a std::runtime_error that starts with the op's name and
// ends with the driver's own words.
#pragma once

#include <string>

#include "config/config.h"
#include "types.h"

namespace mla_fp8::cuda {

inline constexpr int kMaxDevices = 64;

struct DeviceState;

// Makes a device's context current as long as it lives, and refuses devices that the kernels do not
// run on. Every launcher begins with one.
class CurrentDevice {
 public:
  CurrentDevice(const char* op, int device_index);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

  const Device& limits() const;  // for select_config

  // Launches the config's kernel with `params` as its only argument, or nothing where grid_x is 0.
  // It may start before its predecessor in the stream has finished (programmatic dependent launch):
  // every kernel waits by griddepcontrol.wait. Loads the kernel at its first use on this device,
  // also inside stream capture. A kernel that says so may get fewer `threads` a CTA than its tile
  // has.
  void launch(const Config& config, const void* params, void* stream, int threads = 0) const;

  // Only loads the kernel. `stream` tells whether a capture is under way.
  void load(const Tile& tile, void* stream) const;

 private:
  const char* op_;
  int index_;
  const DeviceState* state_;
  bool pushed_ = false;
};

// The config of a launch: select_config's, unless a benchmark or a test forces a tile. Throws
// std::runtime_error where no tile, or not the forced one, can run the problem.
Config choose_config(const Problem& problem, const Device& device);

// What the driver tells of a device, as "num_sms=132 dram_gbps=3017.088": these are fields of
// struct Device. It makes no context.
std::string describe_device(const char* op, int device_index);

}  // namespace mla_fp8::cuda
