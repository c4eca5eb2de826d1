// What phases.cuh shares with launchers.
#pragma once

namespace mla_fp8::phases {

inline constexpr int kMaxGrid = 264;  // CTAs that can run at once: two on each of 132 SMs. Larger grids have no phases.
inline constexpr int kSlots = 16;  // launches that may run at once without meeting each other's counters

inline constexpr unsigned kPatienceCycles = 40000;  // 23 µs: a phase takes up to 20

}  // namespace mla_fp8::phases
