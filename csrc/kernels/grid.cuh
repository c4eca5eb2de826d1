// How every kernel begins, and which tiles a CTA has. The only file that may say griddepcontrol: a kernel may start while its
// predecessor in the stream drains (programmatic dependent launch), so what it does before and after the wait is a rule.
#pragma once

#include "kernels/ptx/griddepcontrol.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/types.h"

namespace mla_fp8 {

// Every thread of every kernel, before it touches memory that another kernel writes and before its first global write. The
// successor may start once every CTA is here: after the own wait, so that a grid never overlaps with its grand-successor.
MLA_FP8_DEVICE void wait_for_predecessors() {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
}

// The prologue. `prepare`, by the producers, makes barriers and brings weights to L2: weights are no kernel's output, and what is
// only in L2 is not kept in this CTA. After it every thread sees the barriers.
template <class Prepare>
MLA_FP8_DEVICE void begin(bool is_producer, const Prepare& prepare) {
  if (is_producer) {
    prepare();
    ptx::fence_mbarrier_init_release_cluster();
  }
  __syncthreads();
  wait_for_predecessors();
}

MLA_FP8_DEVICE void wait(u64* barrier, u32 parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// The tiles of this CTA: one column tile of one head, and every row_step-th row tile from row_tile on (config/tile.h).
// Neighbouring CTAs have neighbouring columns of the same rows, so all CTAs in flight together read and write whole tokens.
struct Place {
  i32 head, slice;
  i64 row_tile, row_step;
};

MLA_FP8_DEVICE Place place_of(u32 heads, u32 slices) {
  const u32 columns = heads * slices;
  const u32 column = blockIdx.x % columns;
  return {static_cast<i32>(column / slices), static_cast<i32>(column % slices), blockIdx.x / columns,
          gridDim.x / columns};
}

}  // namespace mla_fp8
