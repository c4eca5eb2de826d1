#include <cstring>
#include <stdexcept>

#include "gpu/driver.h"
#include "gpu/exports.h"

namespace mla_fp8::cuda {
namespace {

thread_local const Tile* forced_tile = nullptr;

}  // namespace

Config choose_config(const Problem& problem, const Device& device) try {
  if (forced_tile != nullptr && forced_tile->op == problem.op) return configure(*forced_tile, problem, device);
  return select_config(problem, device);
} catch (const std::invalid_argument& refusal) {
  throw std::runtime_error(refusal.what());  // an op's errors are RuntimeError, all of them
}

}  // namespace mla_fp8::cuda

int mla_fp8_force_tile(const char* symbol) {
  using mla_fp8::cuda::forced_tile;
  forced_tile = nullptr;
  if (symbol == nullptr) return 0;
  for (const mla_fp8::Tile& tile : mla_fp8::kTiles) {
    if (std::strcmp(tile.symbol, symbol) == 0) forced_tile = &tile;
  }
  return forced_tile == nullptr;
}
