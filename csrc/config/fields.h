// The fields of each struct that Python sees, named once, in their order: for equality, and for
// attributes, keywords and text there. A field that is missing here does not compile.
#pragma once

#include <tuple>

#include "config/config.h"

namespace mla_fp8 {

// field_names(value) gives "a, b, c"; fields_of(value) references to a, b and c.
#define MLA_FP8_FIELDS(T, ...)                                         \
  constexpr const char* field_names(const T&) { return #__VA_ARGS__; } \
  inline auto fields_of(const T& value) {                              \
    const auto& [__VA_ARGS__] = value;                                 \
    return std::tie(__VA_ARGS__);                                      \
  }                                                                    \
  inline auto fields_of(T& value) {                                    \
    auto& [__VA_ARGS__] = value;                                       \
    return std::tie(__VA_ARGS__);                                      \
  }
MLA_FP8_FIELDS(Problem, op, s, heads, n, k, pe, m, in_bytes, terms, out_bytes, align_bytes)
MLA_FP8_FIELDS(Device, capability, num_sms, smem_bytes_per_cta, smem_bytes_per_sm, smem_bytes_reserved, threads_per_sm,
               registers_per_sm, ctas_per_sm, dram_gbps, l2_gbps, l2_bytes, mma_tflops, launch_us)
MLA_FP8_FIELDS(Tile, symbol, op, capability, m, n, k, stages, threads, smem_bytes, align_bytes, terms, out_bytes,
               ctas_per_sm, regs, persistent, leaves_room, phased, start_us, first_us, next_us, term_us)
MLA_FP8_FIELDS(Config, tile, grid_x, tiles, waves, ctas_per_sm, modelled_bytes, modelled_us)
MLA_FP8_FIELDS(Cost, dram_us, l2_us, sm_us, mma_us)
MLA_FP8_FIELDS(Candidate, config, cost, kept, reason)
#undef MLA_FP8_FIELDS

}  // namespace mla_fp8
