// The config that a launcher uses: select_config's, unless a benchmark or a test forces a tile.
#pragma once

#include "config/config.h"

namespace mla_fp8::cuda {

// Throws std::runtime_error where no tile, or not the forced one, can run the problem.
Config choose_config(const Problem& problem, const Device& device);

}  // namespace mla_fp8::cuda

extern "C" {

// Makes the calling thread's CUDA calls of the tile's op use this tile, or select_config's again where `symbol` is null.
// Returns 0, or 1 if no such tile is compiled. For comparing tiles: a call that the tile cannot run is an error.
__attribute__((visibility("default"))) int mla_fp8_force_tile(const char* symbol);

}  // extern "C"
