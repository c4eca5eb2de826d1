// Makes all CTAs of a launch read at the same time and write at the same time. DRAM loses time
// whenever it turns from reads to writes: with 1 byte read for 4 written, an H100 moves 2.7 TB/s
// where every SM does both at any time, and 3.0 TB/s in phases of 17 and 67 MB (docs/notes.md).
//
// Phases are a matter of time and not of correctness. A CTA waits for the others for a limited
// time, and once that time has run out it does not wait again. Where not all CTAs run at once,
// because another kernel holds some SMs, the launch is only as fast as without phases.
#pragma once

#include "kernels/numbers.cuh"
#include "kernels/phases.h"
#include "kernels/ptx/atomics.cuh"

namespace mla_fp8::phases {

// How many CTAs have ever arrived, for each grid size and slot. Every launch adds a multiple of its
// grid. A counter serves grids of one size, so between launches it stands at a multiple of that
// size.
__device__ u64 arrivals[kMaxGrid + 1][kSlots];

struct Barrier {
  u32 slot;
  bool patient = true;

  // All threads of a CTA, as often in every CTA.
  MLA_FP8_DEVICE void wait_for_all() {
    __syncthreads();
    if (threadIdx.x == 0) arrive_and_wait();
    __syncthreads();
  }

  MLA_FP8_DEVICE void arrive_and_wait() {
    const bool counted = gridDim.x <= kMaxGrid;
    u64* const counter = &arrivals[counted ? gridDim.x : 0][slot];
    const u64 before = ptx::atom_add_relaxed_gpu(counter, 1);
    const u64 target = (before / gridDim.x + 1) * gridDim.x;
    const u32 start = ptx::clock();
    while (counted && patient && ptx::ld_relaxed_gpu(counter) < target) {
      patient = ptx::clock() - start < kPatienceCycles;
    }
  }
};

}  // namespace mla_fp8::phases
