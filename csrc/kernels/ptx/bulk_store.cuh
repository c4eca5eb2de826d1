// From registers through shared memory to a tensor in global memory, by the copy engine. One lane of a warp issues for all.
#pragma once

#include "kernels/ptx/mbarrier.cuh"
#include "kernels/types.h"

namespace mla_fp8::ptx {

// Four 8x8 matrices of 16-bit elements: lane 8 m + r gives the address of row r of matrix m; word m of lane 4 r + c is its elements 2 c, 2 c + 1.
MLA_FP8_DEVICE void stmatrix_x4_b16(void* row, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Each lane's writes to shared memory become visible to the copy engine; a warp barrier follows, then one lane issues.
MLA_FP8_DEVICE void fence_proxy_async_shared_cta() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Writes the box at (x, y, z), x innermost, from shared memory. Elements out of bounds are not written.
MLA_FP8_DEVICE void cp_async_bulk_tensor_store_3d(const TensorMap* map, const void* from, i32 x, i32 y, i32 z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map),
               "r"(x), "r"(y), "r"(z), "r"(shared_address(from))
               : "memory");
}

// Closes the batch of stores that the thread issued since the last one.
MLA_FP8_DEVICE void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most kPending of the thread's batches still read shared memory: what older ones read may be written again.
template <int kPending>
MLA_FP8_DEVICE void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace mla_fp8::ptx
