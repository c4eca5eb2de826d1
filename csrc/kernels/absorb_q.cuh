// 1. q[s,h,:R] = scale_a * scale_w * (e4m3(q_nope[s,h,:] / scale_a) . W_UK[h]),  q[s,h,R:] = q_pe[s,h,:],  each rounded once to q's dtype
//
// 2. Tensors   q_nope  [S,H,D]        bf16 or fp16, any s and h stride; D = 128 here, any multiple of it in absorb_q_kloop.cuh
//              q_pe    [S,H,P]        like q_nope, or null
//              w_uk    [H,R,D]        e4m3, by tensor map: strides and address multiples of 16
//              w_scale [H,R/128,1]    fp32, any strides
//              q       [S,H,R+P]      q_nope's dtype, or e4m3 of the value / out_scale; any s and h stride
//              Pointers and strides of q_nope, q_pe and q are aligned to the tile's alignment: 16 bytes, or an element.
//
//              Few rows: absorb_q_few.cuh. Some: absorb_q_shared.cuh. Many: absorb_q_phased.cuh. Here: the rest, and what they share.
//
// 3. Grid      a CTA holds kTileN columns of one head's W_UK and takes the row tiles (config/tiles.h). Neighbouring CTAs have
//              neighbouring columns of the same rows, so all CTAs in flight together read and write whole tokens.
//
// 4. Warps     warpgroups of 64 rows each, on their own once the barriers are made: each loads its rows, quantizes them in registers (a
//              quad of lanes holds a row), multiplies, scales and stores 128 columns at a time. The last warp's first lane also starts the
//              copies of weights: with few rows that warp has none. Registers: 64 accumulators, 16 of the A fragment, 32 of raw rows.
//              A lone warpgroup (few rows: four CTAs an SM, all loads of the SM in flight at once) loads to registers. Several (many rows:
//              one to two CTAs an SM) bring the next rows to shared memory while they work on these. Output goes from registers to global
//              memory, first to leave L2: the copy engine's boxes were slower (docs/notes.md).
//
// 5. Pipeline  what            producer -> consumer    arrivals  bytes
//              full[chunk]     copy engine -> all      1         16384, once a launch
//              cp.async batch  a warp -> itself        32        128 a thread of q_nope, up to 64 of q_pe
//
// 6. Shared memory  w_uk 128 kTileN bytes in chunks of 128 columns, 128-byte swizzle; stage 24576 bytes a warpgroup; full 8 bytes a chunk.
//
// 7. Cost      bytes = S H (2 D + 2 P) + H R D (1 + 4 / 16384) + S H (R + P) out_bytes; 2 S H R D FLOP. Bound by memory at every S: 1.6 FLOP
//              a byte at S = 1, 102 at large S, where the MMA needs a sixth of the time.
//
// 8. Numerics  the 1x128 quantization of docs/numerics.md; exact products, fp32 sums by the tensor core over K = 128; one fp32 product with
//              scale_a * scale_w; one rounding to q's dtype. Zero rows give zeros; a NaN or Inf makes its own row NaN and no other.
#pragma once

#include "kernels/absorb_q.h"
#include "kernels/fragment.cuh"
#include "kernels/pe.cuh"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/griddepcontrol.cuh"
#include "kernels/weights.cuh"

namespace mla_fp8::absorb_q {

// Both rows' 128 columns from `column` on.
template <int kOutBytes, int kAlignBytes>
MLA_FP8_DEVICE void store_columns(const Params& p, const RowValues (&rows)[kLaneRows], i64 row, i64 head, i32 column,
                                  float multiplier, int quad) {
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const i64 lane_row = row + i * kLaneRowStep;
    store_row<kOutBytes, kAlignBytes>(p.q, lane_row * p.q_stride[0] + head * p.q_stride[1] + column, rows[i],
                                      multiplier, p.is_fp16 != 0, lane_row < p.s, quad);
  }
}

// Both rows' products with 128 weight rows, scaled as a sum of one block is, also in its zeros' signs.
template <int kOutBytes, int kAlignBytes>
MLA_FP8_DEVICE void store_products(const Params& p, float (&values)[64], const float (&scale)[kLaneRows], i64 row,
                                   i64 head, i32 column, float multiplier, int quad) {
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = __fmaf_rn(values[i], scale[i / 2 % 2], 0.0f);
  const RowValues rows[kLaneRows] = {row_values(values, 0), row_values(values, 1)};
  store_columns<kOutBytes, kAlignBytes>(p, rows, row, head, column, multiplier, quad);
}

// What one thread of a CTA works on.
template <class Config>
struct Worker {
  const Params& p;
  const Place at;
  const i32 slices;
  const LanePlace lane;
  const float w_scale;  // of chunk lane % kChunks: loaded once, shuffled to all
  const float out_scale;

  // A division, so not before the first loads are on their way.
  MLA_FP8_DEVICE float multiplier() const { return Config::kOutBytes == 1 ? __frcp_rn(out_scale) : 1.0f; }

  MLA_FP8_DEVICE const u16* source(i64 row) const {
    return p.q_nope + row * p.q_nope_stride[0] + at.head * p.q_nope_stride[1];
  }

  // Where a quad's vector of 16 bytes stands. Rows 2 and 3 of every four exchange halves, so that 16 lanes' 8 bytes are in 32 banks.
  MLA_FP8_DEVICE u8* place(Stage<true>& stage, int plane, int vector) const {
    const int first_of_quad = static_cast<int>(threadIdx.x) % kWarpgroup / kQuad * kQuad;
    return stage.q_nope[plane][first_of_quad + (vector ^ (lane.row & 2))];
  }

  // Starts copying the warpgroup's rows from first_row on.
  MLA_FP8_DEVICE void fetch(Stage<true>& stage, i64 first_row) const {
    const int thread = threadIdx.x % kWarpgroup;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const i64 row = first_row + lane.row + i * kLaneRowStep;
      const u16* from = source(row < p.s ? row : 0) + lane.quad * 8;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        ptx::cp_async_cg_16(place(stage, i * kSteps + step, lane.quad), from + step * kWgmmaK,
                            row < p.s ? kVectorBytes : 0);
      }
    }
    if (p.pe != 0) {
#pragma unroll
      for (int j = 0; j < kPeVectors; ++j) {
        const PeChunk chunk = pe_chunk(p, first_row, pe_index<kWarpgroup>(at.slice, slices, j));
        if (chunk.exists) ptx::cp_async_cg_16(stage.q_pe[j][thread], pe_source(p, chunk, at.head), kVectorBytes);
      }
    }
    ptx::cp_async_commit_group();
  }

  // The fetched rows become the fragment, their q_pe is stored; the stage is free after it.
  MLA_FP8_DEVICE void consume(Stage<true>& stage, i64 first_row, Fragment& fragment) const {
    const int thread = threadIdx.x % kWarpgroup;
    ptx::cp_async_wait_group<0>();
    RawRow raw[kLaneRows];
    __syncwarp();  // every lane has waited for its copies
#pragma unroll
    for (int i = 0; i < 2 * kLaneRows * kSteps; ++i) {
      const int plane = i / 2;
      load_shared_half(raw[plane / kSteps].word[plane % kSteps] + i % 2 * 2,
                       place(stage, plane, i % 2 * 2 + lane.quad / 2) + lane.quad % 2 * 8);
    }
    __syncwarp();  // the next rows may come
    quantize(raw, p.is_fp16 != 0, fragment);
    if (p.pe != 0) {
#pragma unroll
      for (int j = 0; j < kPeVectors; ++j) {
        PeChunk chunk = pe_chunk(p, first_row, pe_index<kWarpgroup>(at.slice, slices, j));
        load_shared(chunk.word, stage.q_pe[j][thread]);
        store_pe<Config::kOutBytes, Config::kAlignBytes>(p, chunk, at.head, multiplier());
      }
      copy_pe<Config::kOutBytes, Config::kAlignBytes, kWarpgroup>(p, first_row, at.head, at.slice, slices, kPeVectors,
                                                                  multiplier());
    }
  }

  // Both at once, through registers.
  MLA_FP8_DEVICE void load(i64 first_row, Fragment& fragment) const {
    RawRow raw[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const i64 row = first_row + lane.row + i * kLaneRowStep;
      load_row<Config::kAlignBytes>(raw[i], source(row), row < p.s, lane.quad);
    }
    PeChunk pe;
    if (p.pe != 0) pe = load_pe<Config::kAlignBytes>(p, first_row, at.head, pe_index<kWarpgroup>(at.slice, slices, 0));
    quantize(raw, p.is_fp16 != 0, fragment);
    if (p.pe != 0) {
      store_pe<Config::kOutBytes, Config::kAlignBytes>(p, pe, at.head, multiplier());
      copy_pe<Config::kOutBytes, Config::kAlignBytes, kWarpgroup>(p, first_row, at.head, at.slice, slices, 1,
                                                                  multiplier());
    }
  }

  // The warpgroup's 64 rows x 128 columns of chunk `chunk`.
  MLA_FP8_DEVICE void multiply_and_store(const typename Config::Shared& shared, int chunk, i64 first_row,
                                         Fragment& fragment) const {
    float values[64];
    multiply(values, fragment, shared.w_uk[chunk]);
    const float chunk_scale = __shfl_sync(kFullWarp, w_scale, chunk);
    float scale[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) scale[i] = __fmul_rn(fragment.scale[i], chunk_scale);
    const i32 column = at.slice * Config::kTileN + chunk * kChunkN;
    store_products<Config::kOutBytes, Config::kAlignBytes>(p, values, scale, first_row + lane.row, at.head, column,
                                                           multiplier(), lane.quad);
  }
};

// By one thread: kTiles weight tiles of 128 columns, from first_column on, to L2; and to shared memory, each behind a barrier.
template <int kOutBytes, int kTiles>
MLA_FP8_DEVICE void prefetch_weights(const Params& p, u64* full, i32 first_column, i32 head) {
  ptx::prefetch_tensormap(&p.w_uk);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    prefetch_weight_tile<kLaneColumns<kOutBytes>>(&p.w_uk, 0, first_column + tile * kChunkN, head);
    ptx::mbarrier_init(full + tile, 1);
  }
  ptx::fence_mbarrier_init_release_cluster();
}

template <int kOutBytes, int kTiles>
MLA_FP8_DEVICE void load_weights(const Params& p, u8* tiles, u64* full, i32 first_column, i32 head) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    load_weight_tile<kLaneColumns<kOutBytes>>(tiles + tile * kWeightTileBytes, &p.w_uk, 0,
                                              first_column + tile * kChunkN, head, full + tile);
  }
}

template <class Config>
MLA_FP8_DEVICE void run(const Params& p, typename Config::Shared& shared) {
  constexpr int kChunks = Config::kChunks;
  const i32 slices = p.r / Config::kTileN;
  const Place at = place_of(p.h, slices);
  const bool is_producer = threadIdx.x == Config::kThreads - 32;  // in the warp with the fewest rows
  const float* w_scale = p.w_uk_scale + at.head * p.w_uk_scale_stride[0] +
                         (at.slice * kChunks + threadIdx.x % kChunks) * p.w_uk_scale_stride[1];

  if (is_producer) prefetch_weights<Config::kOutBytes, kChunks>(p, shared.full, at.slice * Config::kTileN, at.head);
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (is_producer && at.row_tile * Config::kTileM < p.s) {
    load_weights<Config::kOutBytes, kChunks>(p, shared.w_uk[0], shared.full, at.slice * Config::kTileN, at.head);
  }
  __syncwarp();

  const Worker<Config> worker{p, at, slices, lane_place(), *w_scale, Config::kOutBytes == 1 ? *p.out_scale : 1.0f};
  const int warpgroup = threadIdx.x / kWarpgroup;
  const u32 rows = p.s;  // below 2^31, so that no sum of rows and a step wraps
  const u32 row_step = static_cast<u32>(at.row_step) * Config::kTileM;
  u32 first_row = static_cast<u32>(at.row_tile) * Config::kTileM + warpgroup * kWarpgroupM;
  if constexpr (Config::kStaged) {
    if (first_row < rows) worker.fetch(shared.stage[warpgroup], first_row);
  }
  for (bool first = true; first_row < rows; first_row += row_step, first = false) {
    Fragment fragment;
    if constexpr (Config::kStaged) {
      worker.consume(shared.stage[warpgroup], first_row, fragment);
      if (first_row + row_step < rows) worker.fetch(shared.stage[warpgroup], first_row + row_step);
    } else {
      worker.load(first_row, fragment);
    }
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (first) wait(&shared.full[chunk], 0);
      worker.multiply_and_store(shared, chunk, first_row, fragment);
    }
  }
  // Every copy has landed before the CTA ends: the warpgroup of its first rows waited for all.
}

}  // namespace mla_fp8::absorb_q
