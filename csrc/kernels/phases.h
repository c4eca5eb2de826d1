// What phases.cuh shares with launchers.
#pragma once

namespace mla_fp8::phases {

// CTAs that can run at once: two on each of 132 SMs. Larger grids have no phases.
inline constexpr int kMaxGrid = 264;
// Launches that may run at once without sharing a counter.
inline constexpr int kSlots = 16;

inline constexpr unsigned kPatienceCycles = 40000;  // 23 µs: a phase takes up to 20

}  // namespace mla_fp8::phases
