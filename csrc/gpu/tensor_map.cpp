#include "gpu/tensor_map.h"

#include <algorithm>
#include <string>

#include "gpu/driver_abi.h"

namespace mla_fp8::cuda {
namespace {

// A layer has a map for w_uk and one for w_uv: enough for two models of 61 layers, at 256 bytes each.
constexpr size_t kKeptMaps = 256;
static_assert((kKeptMaps & (kKeptMaps - 1)) == 0, "a slot is the low bits of a hash");

struct KeptMap {
  TensorMapSpec spec{};  // rank 0: empty
  TensorMap map;
};
static_assert(sizeof(KeptMap) == 256);

bool same(const TensorMapSpec& a, const TensorMapSpec& b) {
  return a.rank == b.rank && a.address == b.address && a.type == b.type && a.swizzle == b.swizzle &&
         std::equal(a.dims, a.dims + a.rank, b.dims) &&
         std::equal(a.strides_bytes + 1, a.strides_bytes + a.rank, b.strides_bytes + 1) &&
         std::equal(a.box, a.box + a.rank, b.box);
}

size_t slot_of(const TensorMapSpec& spec) {
  constexpr uint64_t kOddMultiplier = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio: Fibonacci hashing
  uint64_t hash = reinterpret_cast<uintptr_t>(spec.address);
  for (int i = 1; i < spec.rank; ++i) hash = (hash ^ spec.dims[i]) * kOddMultiplier;
  return static_cast<size_t>(hash >> 32) & (kKeptMaps - 1);
}

void encode(const char* op, const char* tensor, const TensorMapSpec& spec, TensorMap* map) {
  const abi::Driver& driver = driver_for(op);
  constexpr uint64_t kStrideStep = 16;
  constexpr uint32_t kElementStrides[kMaxTensorMapRank] = {1, 1, 1, 1, 1};
  uint64_t strides[kMaxTensorMapRank];
  strides[0] = kStrideStep;
  for (int i = 1; i < spec.rank; ++i) strides[i] = spec.dims[i] == 1 ? strides[i - 1] : spec.strides_bytes[i];
  const abi::Result result =
      driver.tensor_map_encode_tiled(map, static_cast<uint32_t>(spec.type), static_cast<uint32_t>(spec.rank),
                                     spec.address, spec.dims, strides + 1, spec.box, kElementStrides, /*interleave=*/0,
                                     static_cast<uint32_t>(spec.swizzle), abi::kL2Promotion256Bytes, /*oob_fill=*/0);
  if (result == abi::kSuccess) return;
  std::string what = std::string("the tensor map of ") + tensor + " (dims, byte strides, box)";
  for (int i = 0; i < spec.rank; ++i) {
    what += " [" + std::to_string(spec.dims[i]) + ", " + (i == 0 ? "-" : std::to_string(strides[i])) + ", " +
            std::to_string(spec.box[i]) + "]";
  }
  check(op, driver, result, what);
}

}  // namespace

void encode_tensor_map(const char* op, const char* tensor, const TensorMapSpec& spec, TensorMap* map) {
  thread_local KeptMap kept_maps[kKeptMaps];
  KeptMap& kept = kept_maps[slot_of(spec)];
  if (!same(kept.spec, spec)) {
    kept.spec.rank = 0;
    encode(op, tensor, spec, &kept.map);
    kept.spec = spec;
  }
  *map = kept.map;
}

}  // namespace mla_fp8::cuda
