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
