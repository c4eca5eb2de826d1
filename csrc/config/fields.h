// The fields of each struct that Python sees, named once: for equality, and for attributes, keywords and text there.
#pragma once

#include <tuple>
#include <utility>

#include "config/config.h"

namespace mla_fp8 {

template <typename T>
struct Fields;

#define MLA_FP8_FIELD(name) std::make_pair(#name, &T::name)
template <>
struct Fields<Problem> {
  using T = Problem;
  static constexpr auto kAll = std::make_tuple(
      MLA_FP8_FIELD(op), MLA_FP8_FIELD(s), MLA_FP8_FIELD(heads), MLA_FP8_FIELD(n), MLA_FP8_FIELD(k), MLA_FP8_FIELD(pe),
      MLA_FP8_FIELD(m), MLA_FP8_FIELD(in_bytes), MLA_FP8_FIELD(out_bytes), MLA_FP8_FIELD(align_bytes));
};
template <>
struct Fields<Device> {
  using T = Device;
  static constexpr auto kAll = std::make_tuple(
      MLA_FP8_FIELD(num_sms), MLA_FP8_FIELD(smem_bytes_per_cta), MLA_FP8_FIELD(smem_bytes_per_sm),
      MLA_FP8_FIELD(smem_bytes_reserved), MLA_FP8_FIELD(threads_per_sm), MLA_FP8_FIELD(registers_per_sm),
      MLA_FP8_FIELD(ctas_per_sm), MLA_FP8_FIELD(dram_gbps), MLA_FP8_FIELD(l2_gbps), MLA_FP8_FIELD(sm_gbps),
      MLA_FP8_FIELD(l2_bytes), MLA_FP8_FIELD(mma_tflops), MLA_FP8_FIELD(launch_us), MLA_FP8_FIELD(latency_us));
};
template <>
struct Fields<Tile> {
  using T = Tile;
  static constexpr auto kAll = std::make_tuple(
      MLA_FP8_FIELD(symbol), MLA_FP8_FIELD(op), MLA_FP8_FIELD(m), MLA_FP8_FIELD(n), MLA_FP8_FIELD(k),
      MLA_FP8_FIELD(stages), MLA_FP8_FIELD(threads), MLA_FP8_FIELD(smem_bytes), MLA_FP8_FIELD(align_bytes),
      MLA_FP8_FIELD(out_bytes), MLA_FP8_FIELD(ctas_per_sm), MLA_FP8_FIELD(regs), MLA_FP8_FIELD(persistent),
      MLA_FP8_FIELD(leaves_room), MLA_FP8_FIELD(phased), MLA_FP8_FIELD(start_us), MLA_FP8_FIELD(serial_us));
};
template <>
struct Fields<Config> {
  using T = Config;
  static constexpr auto kAll =
      std::make_tuple(MLA_FP8_FIELD(tile), MLA_FP8_FIELD(grid_x), MLA_FP8_FIELD(tiles), MLA_FP8_FIELD(waves),
                      MLA_FP8_FIELD(ctas_per_sm), MLA_FP8_FIELD(modelled_bytes), MLA_FP8_FIELD(modelled_us));
};
template <>
struct Fields<Cost> {
  using T = Cost;
  static constexpr auto kAll =
      std::make_tuple(MLA_FP8_FIELD(dram_us), MLA_FP8_FIELD(l2_us), MLA_FP8_FIELD(sm_us), MLA_FP8_FIELD(mma_us));
};
template <>
struct Fields<Candidate> {
  using T = Candidate;
  static constexpr auto kAll =
      std::make_tuple(MLA_FP8_FIELD(config), MLA_FP8_FIELD(cost), MLA_FP8_FIELD(kept), MLA_FP8_FIELD(reason));
};
#undef MLA_FP8_FIELD

// Calls visit(name, pointer to member) for each field of T.
template <typename T, typename Visit>
constexpr void each_field(Visit visit) {
  std::apply([&](const auto&... field) { (visit(field.first, field.second), ...); }, Fields<T>::kAll);
}

template <typename T>
bool same_fields(const T& a, const T& b) {
  return std::apply([&](const auto&... field) { return ((a.*field.second == b.*field.second) && ...); },
                    Fields<T>::kAll);
}

}  // namespace mla_fp8
