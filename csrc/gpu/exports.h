// The C functions that the library exports, for mla_fp8/*.py and for programs without Python. Those
// that can fail return 0, or fill the text with the reason and return 1. The instruction set of the
// CPU code is in cpu/kernels.h.
#pragma once

#include <cstddef>

extern "C" {
#pragma GCC visibility push(default)

// Returns 0 and sets data and size, which must stay alive as long as the process; or fills `error`
// and returns another value.
typedef int (*mla_fp8_image_loader)(const char* name, int device_index, const void** data, size_t* size, char* error,
                                    size_t error_size);

// Registers the loader for kernels that are not embedded; null removes it.
void mla_fp8_set_image_loader(mla_fp8_image_loader loader);

// The kernels of csrc/kernels/<name>.cu that the build embedded, as a fatbin; null: none. A name is
// "<architecture>/<op>".
const void* mla_fp8_embedded_image(const char* name, size_t* size);

// Brings every op's kernels onto the device, so that a capture finds them there.
int mla_fp8_warm_up(int device_index, char* error, size_t error_size);

// Writes what select_config knows of the device, as in "num_sms=132 dram_gbps=3017.088": fields of
// struct Device (config/config.h), those that the driver tells. Makes no context. 1024 bytes are
// enough.
int mla_fp8_device(int index, char* text, size_t text_size);

// Makes the calling thread's CUDA calls of the tile's op use this tile, or select_config's again
// where `symbol` is null. Returns 0, or 1 if no such tile is compiled. For comparing tiles: a call
// that the tile cannot run is an error.
int mla_fp8_force_tile(const char* symbol);

#pragma GCC visibility pop
}  // extern "C"
