// How every kernel begins, and which tiles a CTA takes. This is the only file that may use
// griddepcontrol: a kernel may start while its predecessor in the stream drains (programmatic
// dependent launch), so there are rules for what it does before the wait and after it.
#pragma once

#include "kernels/ptx/griddepcontrol.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "types.h"

namespace mla_fp8 {

// Every thread of every kernel calls this before it touches memory that another kernel writes and
// before its first global write. The successor may start once every CTA has come here. That is
// after the CTA's own wait, so that a grid never overlaps with the successor of its successor.
MLA_FP8_DEVICE void wait_for_predecessors() {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
}

// The prologue. The producers call `prepare`, which makes barriers and prefetches weights to L2.
// That may come before the wait: no kernel writes weights, and what is only in L2 is not kept in
// this CTA. After the prologue every thread sees the barriers.
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

// The tiles of this CTA: one column tile of one head, and every row_step-th row tile from row_tile
// on (config/tile.h). Neighbouring CTAs have neighbouring columns of the same rows, so together all
// CTAs in flight read and write whole tokens.
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
