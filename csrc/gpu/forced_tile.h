// The config that a launcher uses: select_config's, unless a benchmark or a test forces a tile.
#pragma once

#include "config/config.h"

namespace mla_fp8::cuda {

// Throws std::runtime_error where no tile, or not the forced one, can run the problem.
Config choose_config(const Problem& problem, const Device& device);

}  // namespace mla_fp8::cuda
