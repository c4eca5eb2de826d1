#include "gpu/tensor_map.h"

#include <algorithm>
#include <string>

#include "gpu/driver_abi.h"

namespace mla_fp8::cuda {
namespace {

// A layer has a map for w_uk and one for w_uv, so this is enough for two models of 61 layers, at
// 256 bytes a map.
constexpr size_t kKeptMaps = 256;
static_assert((kKeptMaps & (kKeptMaps - 1)) == 0, "a slot is the low bits of a hash");

struct KeptMap {
  TensorMapSpec spec{};  // no address: empty
  TensorMap map;
};
static_assert(sizeof(KeptMap) == 256);

bool operator==(const TensorMapSpec& a, const TensorMapSpec& b) {
  return a.address == b.address && a.dims == b.dims && a.strides_bytes == b.strides_bytes && a.box == b.box;
}

size_t slot_of(const TensorMapSpec& spec) {
  constexpr u64 kOddMultiplier = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio: Fibonacci hashing
  u64 hash = reinterpret_cast<uintptr_t>(spec.address);
  for (size_t i = 1; i < spec.dims.size(); ++i) hash = (hash ^ spec.dims[i]) * kOddMultiplier;
  return static_cast<size_t>(hash >> 32) & (kKeptMaps - 1);
}

void encode(const char* op, const char* tensor, const TensorMapSpec& spec, TensorMap* map) {
  const abi::Driver& driver = driver_for(op);
  constexpr uint64_t kStrideStep = 16;
  constexpr uint32_t kElementStrides[] = {1, 1, 1, 1, 1};
  uint64_t dims[5], strides[5] = {kStrideStep};
  std::copy(spec.dims.begin(), spec.dims.end(), dims);
  for (int i = 1; i < 5; ++i) strides[i] = dims[i] == 1 ? strides[i - 1] : spec.strides_bytes[i];
  const abi::Result result = driver.tensor_map_encode_tiled(
      map, abi::kTensorMapU8, spec.dims.size(), spec.address, dims, strides + 1, spec.box.data(), kElementStrides,
      /*interleave=*/0, abi::kTensorMapSwizzle128Bytes, abi::kL2Promotion256Bytes, /*oob_fill=*/0);
  if (result == abi::kSuccess) return;
  std::string what = text("the tensor map of ", tensor, " (dims, byte strides, box)");
  for (int i = 0; i < 5; ++i) {
    what += text(" [", dims[i], ", ", i == 0 ? "-" : text(strides[i]), ", ", spec.box[i], "]");
  }
  check(op, driver, result, what);
}

}  // namespace

void encode_tensor_map(const char* op, const char* tensor, const TensorMapSpec& spec, TensorMap* map) {
  thread_local KeptMap kept_maps[kKeptMaps];
  KeptMap& kept = kept_maps[slot_of(spec)];
  if (!(kept.spec == spec)) {
    kept.spec.address = nullptr;
    encode(op, tensor, spec, &kept.map);
    kept.spec = spec;
  }
  *map = kept.map;
}

}  // namespace mla_fp8::cuda
