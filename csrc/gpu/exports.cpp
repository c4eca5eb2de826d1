#include "gpu/exports.h"

#include <cstdio>
#include <exception>

#include "gpu/driver.h"

namespace {

// Runs `body`, which returns a text. Returns 0; or the reason as text and 1.
template <typename Body>
int give_text(char* text, size_t text_size, Body body) {
  int status = 0;
  std::string told;
  try {
    told = body();
  } catch (const std::exception& e) {
    told = e.what();
    status = 1;
  }
  std::snprintf(text, text_size, "%s", told.c_str());
  return status;
}

}  // namespace

int mla_fp8_warm_up(int device_index, char* error, size_t error_size) {
  return give_text(error, error_size, [&] {
    for (const mla_fp8::Tile& tile : mla_fp8::kTiles) {
      const mla_fp8::cuda::CurrentDevice device(mla_fp8::op_name(tile.op), device_index);
      if (tile.capability == device.limits().capability) device.load(tile, nullptr);
    }
    return "";
  });
}

int mla_fp8_device(int index, char* text, size_t text_size) {
  return give_text(text, text_size, [&] { return mla_fp8::cuda::describe_device("mla_fp8_device", index); });
}
