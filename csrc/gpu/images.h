// Compiled kernels that travel inside the library: one image an op, named after it.
#pragma once

#include <cstddef>

namespace mla_fp8 {

struct Image {
  const char* name;  // "quantize_q_nope", "bmm", "absorb_q", "v_up"
  const void* data;  // fatbin or cubin, alive as long as the process
  size_t size;       // bytes
};

// The image embedded at build time, or null: the build makes its definition, which finds nothing without nvcc.
const Image* find_embedded_image(const char* name);

// The image that the registered loader makes (mla_fp8/jit.py compiles it), for kernels that were not embedded or that
// the driver refuses. Throws std::runtime_error that starts with `op` when no loader is registered or when it fails.
Image load_image(const char* op, const char* name, int device_index);

}  // namespace mla_fp8

extern "C" {

// Returns 0 and sets data and size, which must stay alive as long as the process; or fills `error` and returns another
// value.
typedef int (*mla_fp8_image_loader)(const char* name, int device_index, const void** data, size_t* size, char* error,
                                    size_t error_size);

// Registers the loader for kernels that are not embedded; null removes it.
__attribute__((visibility("default"))) void mla_fp8_set_image_loader(mla_fp8_image_loader loader);

// Brings every op's kernels onto the device, so that a capture finds them there. Returns 0, or fills `error` and
// returns 1.
__attribute__((visibility("default"))) int mla_fp8_warm_up(int device_index, char* error, size_t error_size);

}  // extern "C"
