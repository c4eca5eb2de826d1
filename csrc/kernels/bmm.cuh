// 1. c[b,r,:] = sum over k of  a_scale[b,r,k] * b_scale[b,n/128,k] * (a[b,r,128 k..] . b[b,n,128 k..]),  rounded once to bf16
//
// 2. Tensors   a        [B,M,K]          e4m3, any b and m stride; rows >= m are not read
//              a_scale  [B,M,K/128]      fp32, any strides
//              b        [B,N,K]          e4m3, by tensor map: strides and address multiples of 16
//              b_scale  [B,N/128,K/128]  fp32, any strides
//              c        [B,m,N]          bf16, any b and m stride
//              Pointers and strides of a and c are aligned to the tile's alignment: 16 bytes, or an element.
//
// 3. Grid, 4. Warps, 5. Pipeline, 6. Shared memory: kloop.cuh, with B in the place of the heads.
//
// 7. Cost      bytes = B m K + B m K / 32 + B N K (1 + 4 / 16384) + 2 B m N; 2 B m N K FLOP. Bound by memory for K = 128 and for small m.
//
// 8. Numerics  kloop.cuh's sums, one rounding to bf16; so absorb_q without q_pe and out_scale returns the bits of bmm(quantize_q_nope(q)).
//              A NaN in a row of a, or in its scale, makes that row of c NaN and no other.
#pragma once

#include "kernels/bmm.h"
#include "kernels/kloop.cuh"

namespace mla_fp8::bmm {

// Activations that are e4m3 already.
template <int kAlignBytes>
struct Source {
  const u8* a;  // of this b
  i64 row_stride;
  const float* scale;  // of this b
  i64 scale_row_stride, scale_step;
  i64 rows;
  int quad;

  static constexpr int kVectors = kGroup / (kQuad * kVectorBytes);  // a lane's share of a row's group

  using Vectors = u32[kLaneRows * kVectors][4];

  MLA_FP8_DEVICE void fetch(kloop::Stage<1>& stage, i64 row, i32 block) const {
    const int thread = threadIdx.x % kloop::kWarpgroup;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const i64 lane_row = row + i * kLaneRowStep;
      const bool exists = lane_row < rows;
      const i64 safe_row = exists ? lane_row : 0;
      ptx::cp_async_ca_4(&stage.scale[i][thread], scale + safe_row * scale_row_stride + block * scale_step,
                         exists ? sizeof(float) : 0);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        ptx::cp_async_cg_16(stage.vector[i * kVectors + v][thread],
                            a + safe_row * row_stride + block * kGroup + (v * kQuad + quad) * kVectorBytes,
                            exists ? kVectorBytes : 0);
      }
    }
  }

  MLA_FP8_DEVICE void consume(const kloop::Stage<1>& stage, Fragment& fragment) const {
    const int thread = threadIdx.x % kloop::kWarpgroup;
    Vectors vectors;
#pragma unroll
    for (int i = 0; i < kLaneRows * kVectors; ++i) load_shared(vectors[i], stage.vector[i][thread]);
    arrange(vectors, fragment);
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) fragment.scale[i] = stage.scale[i][thread];
  }

  // 16 e4m3, zeros if the row is past the end.
  static MLA_FP8_DEVICE void load_vector(u32 (&to)[4], const u8* from, bool exists) {
    if (!exists) {
#pragma unroll
      for (u32& word : to) word = 0;
    } else if constexpr (kAlignBytes == kVectorBytes) {
      ptx::ld_global_no_allocate_v4(to, from);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        to[i] = from[4 * i] | from[4 * i + 1] << 8 | from[4 * i + 2] << 16 | static_cast<u32>(from[4 * i + 3]) << 24;
    }
  }

  MLA_FP8_DEVICE void load(i64 row, i32 block, Fragment& fragment) const {
    Vectors vectors;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const i64 lane_row = row + i * kLaneRowStep;
      const bool exists = lane_row < rows;
      fragment.scale[i] = exists ? scale[lane_row * scale_row_stride + block * scale_step] : 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        load_vector(vectors[i * kVectors + v],
                    a + lane_row * row_stride + block * kGroup + (v * kQuad + quad) * kVectorBytes, exists);
      }
    }
    arrange(vectors, fragment);
  }

  // Lane t has columns 16 t.. of each 64, and gets 4 t.., 16 + 4 t.., 32 + 4 t.., 48 + 4 t...
  MLA_FP8_DEVICE void arrange(Vectors& vectors, Fragment& fragment) const {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        u32(&word)[4] = vectors[i * kVectors + v];
        transpose_quad(word, quad);
        fragment.a[2 * v][i] = word[0];
        fragment.a[2 * v][2 + i] = word[1];
        fragment.a[2 * v + 1][i] = word[2];
        fragment.a[2 * v + 1][2 + i] = word[3];
      }
    }
  }
};

template <class Config>
MLA_FP8_DEVICE void run(const Params& p, typename Config::Shared& shared) {
  const Place at = place_of(p.batch, p.n / kloop::kTileN);
  const kloop::Weights weights{&p.b,
                               p.b_scale + at.head * p.b_scale_stride[0] + at.slice * p.b_scale_stride[1],
                               p.b_scale_stride[2],
                               at.head,
                               at.slice * kloop::kTileN,
                               p.k / kloop::kTileK};
  const LanePlace lane = lane_place();
  const Source<Config::kAlignBytes> source{p.a + at.head * p.a_stride[0],
                                           p.a_stride[1],
                                           p.a_scale + at.head * p.a_scale_stride[0],
                                           p.a_scale_stride[1],
                                           p.a_scale_stride[2],
                                           p.m,
                                           lane.quad};
  kloop::run<Config>(weights, at, p.m, shared, source, [&](i64 row, const float (&sums)[64]) {
    constexpr int kOutAlignBytes = Config::kAlignBytes == kVectorBytes ? kVectorBytes : 2;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const i64 lane_row = row + i * kLaneRowStep;
      store_row<2, kOutAlignBytes>(p.c, at.head * p.c_stride[0] + lane_row * p.c_stride[1] + weights.first_column,
                                   row_values(sums, i), 1.0f, false, lane_row < p.m, lane.quad);
    }
  });
}

}  // namespace mla_fp8::bmm
