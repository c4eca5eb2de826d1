// SharedRows: some or many rows a head, quantized once for all warpgroups of a CTA.
//
// 1. Formula   that of few.cuh
//
// 2. Tensors   as in product.h; x, q_pe and out aligned to 16 bytes.
//
// 3. Grid      A CTA holds kTileN columns of one head's weights and takes row tiles of 64 rows
//              (grid.cuh): one at a time, or with phases a burst of them, as many as are kept.
//
// 4. Warps     All threads bring the rows, 8 threads a row and block. Each brings what it quantizes
//              itself, and the next rows come while the present ones are worked on. Then each
//              warpgroup multiplies, scales and stores its kChunks times kColumns columns. Without
//              phases q_pe comes through registers, two row tiles ahead; with phases it comes
//              through the ring in shared memory, as the rows do. kStages warps start the copy of
//              one weight tile each. Registers: kBlocks kColumns / 2 accumulators.
//
// 5. Pipeline  barrier         producer -> consumer                 arrivals     bytes
//              full[tile]      copy engine -> its warpgroups        1            16384
//              cp.async batch  a thread -> itself                   -            32 kSlots a thread
//              CTA             rows, scales written -> all read     all threads  -
//              phase           a burst stored -> the next fetched   all CTAs     -
//              full completes once a launch; a tile is 128 columns and one block of k.
//              kAhead batches of a row tile each are under way. With phases a batch also has 16
//              bytes of q_pe a thread. With kAhead = 0 rows come to registers, one row tile ahead.
//              Without phases two buffers of rows alternate, so that one CTA barrier a row tile is
//              enough. With phases the phase barrier (phases.cuh) is also a CTA barrier: a burst's
//              rows have been read before they are written again. Where a row shares a scale, one
//              more CTA barrier exchanges the warpgroups' amax.
//
// 6. Shared memory   w 16384 bytes a tile of 128 x 128; the kept row tiles, two without phases and
//              a burst with them, each with 8192 bytes of rows a block, 256 of scales a block and,
//              in phases, its q_pe; what is ahead; amax; barriers.
//
// 7. Cost      Bytes: x and out once, weights once a CTA. Bound by memory.
//
// 8. Numerics  those of few.cuh, bit for bit.
#pragma once

#include "kernels/sm90/bursts.cuh"
#include "kernels/sm90/lanes.cuh"
#include "kernels/sm90/pe.cuh"
#include "kernels/sm90/rows.cuh"
#include "kernels/sm90/weights.cuh"

namespace mla_fp8::sm90 {

template <class C>
using PeOf = Pe<C::kTileM, C::kThreads, true, C::kOutBytes>;

// A thread's share of the row tiles to come: in its own places of a ring in shared memory, or in
// registers if kAhead is 0. With phases, q_pe comes through the same ring.
template <class C>
struct RowsAhead {
  const Product& p;
  typename C::Shared& shared;
  const PeOf<C>& pe;
  bool has_pe;
  const u16* from;  // the head's
  int stage = 0;  // of the oldest tile under way, which is taken and then fetched over
  RowPart part[C::kSlots];

  static MLA_FP8_DEVICE int lane() { return threadIdx.x % kParts; }
  static MLA_FP8_DEVICE int row(int slot) { return (threadIdx.x / kParts + slot * C::kSlotRows) % C::kTileM; }
  static MLA_FP8_DEVICE int block(int slot) { return slot * C::kSlotRows / C::kTileM; }

  // The row tile from first_row on, unless it begins at `end` or later.
  MLA_FP8_DEVICE void fetch(u64 first_row, u32 end) {
    if (first_row < end) {
#pragma unroll
      for (int i = 0; i < C::kSlots; ++i) {
        const u32 at = static_cast<u32>(first_row) + row(i);
        const bool exists = at < static_cast<u32>(p.s);
        const u16* group = from + (exists ? at : 0) * p.x_stride[0] + block(i) * kGroup;
        if constexpr (C::kAhead == 0) {
          load_part(part[i], group, lane(), exists);
        } else {
          copy_part(shared.ahead[stage][i], group, lane(), exists);
        }
      }
      if constexpr (C::kPhased) {
        if (has_pe) {
          const PeChunk chunk = pe.place(static_cast<u32>(first_row), 0);
          if (chunk.exists) ptx::cp_async_cg_16(shared.pe_ahead[stage][threadIdx.x], pe.source(chunk), kVectorBytes);
        }
      }
    }
    if constexpr (C::kAhead != 0) {
      ptx::cp_async_commit_group();
      stage = stage + 1 == C::kAhead ? 0 : stage + 1;
    }
  }

  // The first fetches of a burst, or of all row tiles.
  MLA_FP8_DEVICE void start(u32 first_row, u32 step, u32 end) {
#pragma unroll
    for (int i = 0; i < C::kUnderWay; ++i) fetch(first_row + u64{1} * i * step, end);
  }

  // Waits for the oldest tile, whose rows are then in `part`. With kAhead = 0 the next tile is
  // fetched into the same registers, after split_to().
  MLA_FP8_DEVICE void take(u32 (&pe_word)[4]) {
    if constexpr (C::kAhead != 0) {
      ptx::cp_async_wait_group<C::kAhead - 1>();
#pragma unroll
      for (int i = 0; i < C::kSlots; ++i) take_part(part[i], shared.ahead[stage][i]);
      if (C::kPhased && has_pe) load_words(pe_word, shared.pe_ahead[stage][threadIdx.x]);
    }
  }

  template <class S>
  MLA_FP8_DEVICE void split_to(u8* planes, float* scales) const {
#pragma unroll
    for (int i = 0; i < C::kSlots; ++i) {
      split_part<S, C::kPlaneBytes>(planes + block(i) * (C::kTileM * kGroup), scales + block(i) * C::kTileM + row(i),
                                    part[i], row(i), lane());
    }
  }
};

// The row tiles that a CTA keeps in shared memory: the planes of all tiles, then their scales, then
// their q_pe as it will be stored.
template <class C>
struct Tiles {
  u8* bytes;
  int count, plane_bytes;  // of all terms

  MLA_FP8_DEVICE Tiles(u8* from, int terms, bool keeps_pe)
      : bytes(from), count(C::buffers(terms, keeps_pe)), plane_bytes(terms * C::kPlaneBytes) {}

  MLA_FP8_DEVICE u8* planes(int tile) const { return bytes + tile * plane_bytes; }
  MLA_FP8_DEVICE float* scales(int tile) const {
    return reinterpret_cast<float*>(bytes + count * plane_bytes + tile * C::kScaleBytes);
  }
  // A thread's chunk, 8 or 16 bytes.
  MLA_FP8_DEVICE u32* pe(int tile) const {
    return reinterpret_cast<u32*>(bytes + count * (plane_bytes + C::kScaleBytes) + tile * C::kPeBytes) +
           threadIdx.x * C::kPeWords;
  }
};

template <class C>
using LaneValues = float[kLaneRows][C::kColumns / kQuad];

// Writes the scales of rows of 128 values, of which a lane has kColumns / 4, to out_row_scale, and
// their reciprocals to `multiplier`.
template <class C>
MLA_FP8_DEVICE void share_row_scales(const Product& p, typename C::Shared& shared, const LaneValues<C>& value,
                                     float (&multiplier)[kLaneRows], u32 first_row, int buffer, i32 head,
                                     const LanePlace& lane) {
  const int warpgroup = threadIdx.x / kWarpgroup;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const float amax = amax_of_lanes<1, kQuad>(value[i]);
    if (lane.quad == 0) shared.amax[buffer][warpgroup][lane.row + i * kLaneRowStep] = amax;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int in_tile = lane.row + i * kLaneRowStep;
    float amax = 0;
#pragma unroll
    for (const auto& columns : shared.amax[buffer]) amax = ptx::max_nan_f32(amax, columns[in_tile]);
    const float scale = group_scale(amax);
    multiplier[i] = group_multiplier(scale);
    const u32 row = first_row + in_tile;
    if (row < static_cast<u32>(p.s) && lane.quad == 0 && warpgroup == 0)
      p.out_row_scale[row * p.out_row_scale_stride[0] + head * p.out_row_scale_stride[1]] = scale;
  }
}

// The warpgroup's kColumns columns from `column` of the CTA's on: multiplied, scaled, stored.
template <class C, int kTerms>
MLA_FP8_DEVICE void multiply_and_store(const Product& p, typename C::Shared& shared, const u8* planes,
                                       const float* scales, const float (&w_scale)[C::kBlocks], int column,
                                       i32 first_column, u32 first_row, int buffer, i32 head, float out_multiplier) {
  const LanePlace lane = lane_place();
  float product[C::kBlocks][C::kColumns / 2];
#pragma unroll
  for (int k = 0; k < C::kBlocks; ++k) {
    const int tile = column / kChunkN * C::kBlocks + k;
    wait(&shared.full[tile], 0);
    ptx::wgmma_fence_sync_aligned();  // after every wait, as in few.cuh
    multiply_group<C::kColumns, kTerms>(product[k], planes + k * (C::kTileM * kGroup), C::kPlaneBytes,
                                        shared.w[tile] + column % kChunkN * kGroup, 0);
  }
  ptx::wgmma_commit_group_sync_aligned();
  float scale[kLaneRows];
  const auto read_scales = [&](int k) {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i)
      scale[i] = __fmul_rn(scales[k * C::kTileM + lane.row + i * kLaneRowStep], w_scale[k]);
  };
  read_scales(0);
  ptx::wgmma_wait_group_sync_aligned<0>();
  LaneValues<C> value = {};
#pragma unroll
  for (int k = 0; k < C::kBlocks; ++k) {
    if (k != 0) read_scales(k);
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
      for (int c = 0; c < C::kColumns / kQuad; ++c)
        value[i][c] = __fmaf_rn(product[k][accumulator_of(c, i)], scale[i], value[i][c]);
    }
  }
  // The 16-bit format is looked at in each store: two copies of these would spill.
  with_output<typename C::Store, /*kOneFormat=*/false>(p, [&](auto element) {
    float multiplier[kLaneRows] = {out_multiplier, out_multiplier};
    if (element.kBytes == 1 && C::Store::kRowScale && p.out_row_scale != nullptr)
      share_row_scales<C>(p, shared, value, multiplier, first_row, buffer, head, lane);
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const u32 row = first_row + lane.row + i * kLaneRowStep;
      store_row<true, C::kLaneColumns>(element, p.out,
                                       row * p.out_stride[0] + head * p.out_stride[1] + first_column + column, value[i],
                                       multiplier[i], row < static_cast<u32>(p.s), lane.quad);
    }
  });
}

// Without phases: the q_pe of the next two row tiles, in registers.
template <class C>
struct PeAhead {
  const PeOf<C>& pe;
  u32 word[2][C::kPeSlots][4];

  // To ahead `i`: the row tile from first_row on, unless it begins at s or later.
  MLA_FP8_DEVICE void fetch(int i, u64 first_row) {
    if (first_row >= static_cast<u32>(pe.p.s)) return;
#pragma unroll
    for (int j = 0; j < C::kPeSlots; ++j) {
      const PeChunk chunk = pe.place(static_cast<u32>(first_row), j);
      if (chunk.exists) load_vector<true>(word[i][j], pe.source(chunk));
    }
  }

  MLA_FP8_DEVICE void store_and_fetch(u32 first_row, u32 step) {
#pragma unroll
    for (int j = 0; j < C::kPeSlots; ++j) {
      PeChunk chunk = pe.place(first_row, j);
#pragma unroll
      for (int k = 0; k < 4; ++k) chunk.word[k] = word[0][j][k], word[0][j][k] = word[1][j][k];
      pe.store(chunk);
    }
    fetch(1, first_row + u64{2} * step);
  }
};

// The weights' scales of a warpgroup's columns.
template <class C>
MLA_FP8_DEVICE void read_w_scales(float (&w_scale)[C::kChunks][C::kBlocks], const Product& p, i32 head, i32 column) {
#pragma unroll
  for (int c = 0; c < C::kChunks; ++c) {
#pragma unroll
    for (int k = 0; k < C::kBlocks; ++k)
      w_scale[c][k] = p.w_scale[head * p.w_scale_stride[0] +
                                (column + c * C::kColumns) / kChunkN * p.w_scale_stride[1] + k * p.w_scale_stride[2]];
  }
}

// Moves a row tile from what is ahead to its place among the kept tiles: its rows split, and in
// phases its q_pe as it will be stored.
template <class C>
MLA_FP8_DEVICE void keep_tile(RowsAhead<C>& rows, const Tiles<C>& kept, int tile, u64 next_row, u32 end) {
  u32 pe_word[4];
  rows.take(pe_word);
  if (C::kAhead != 0) rows.fetch(next_row, end);
  with_split<C::kMostTerms>(rows.p.terms, rows.p.x_dtype == Dtype::kFp16, [&](auto split) {
    rows.template split_to<decltype(split)>(kept.planes(tile), kept.scales(tile));
  });
  if (C::kPhased && rows.has_pe) {
    rows.pe.encode(pe_word);
#pragma unroll
    for (int i = 0; i < C::kPeWords; ++i) kept.pe(tile)[i] = pe_word[i];
  }
}

// Stores the q_pe that is kept of a row tile; copy_from() brings the rest.
template <class C>
MLA_FP8_DEVICE void store_kept_pe(const PeOf<C>& pe, const Tiles<C>& kept, int tile, u32 first_row) {
  PeChunk chunk = pe.place(first_row, 0);
#pragma unroll
  for (int i = 0; i < C::kPeWords; ++i) chunk.word[i] = kept.pe(tile)[i];
  pe.store_encoded(chunk);
}

template <class C>
MLA_FP8_DEVICE void run_shared(const Params& params, typename C::Shared& shared) {
  const Product& p = params.product;
  const i32 slices = static_cast<i32>(p.n) / C::kTileN;
  const Place at = place_of(p.heads, slices);
  const i32 first_column = at.slice * C::kTileN;
  const u32 s = static_cast<u32>(p.s);  // below 2^31, so that no sum of a row and a step wraps
  const u32 step = static_cast<u32>(at.row_step) * C::kTileM;
  u32 first_row = static_cast<u32>(at.row_tile) * C::kTileM;
  begin_with_weights<C>(params, shared, at, C::kPhased || first_row < s);
  if (!C::kPhased && first_row >= s) return;

  PeOf<C> pe{p, at.head, at.slice, slices};
  RowsAhead<C> rows{p, shared, pe, C::Store::kPe && p.pe != 0, static_cast<const u16*>(p.x) + at.head * p.x_stride[1]};
  PeAhead<C> pe_ahead{pe};
  if (!C::kPhased) {
    rows.start(first_row, step, s);
    if (rows.has_pe) pe_ahead.fetch(0, first_row), pe_ahead.fetch(1, first_row + u64{1} * step);
  }
  // The warpgroup's first.
  const int column = threadIdx.x / kWarpgroup * (C::kChunks * C::kColumns);
  float w_scale[C::kChunks][C::kBlocks];
  read_w_scales<C>(w_scale, p, at.head, first_column + column);
  pe.multiplier = read_multiplier<typename C::Store>(p);
  const Tiles<C> kept(shared.tiles, p.terms, C::kPhased && rows.has_pe);
  const Bursts bursts = C::kPhased ? bursts_of<C>(s, at, kept.count) : Bursts{0, 1};
  phases::Barrier phase{params.phase_slot};
  for (u32 done = 0; C::kPhased ? done < bursts.count : first_row < s; ++done, first_row += bursts.tiles * step) {
    const u32 end = C::kPhased ? min(first_row + bursts.tiles * step, s) : s;
    const int tiles = !C::kPhased ? 1 : first_row >= s ? 0 : (end - first_row + step - 1) / step;
    const int buffer = C::kPhased ? 0 : kept.count > 1 ? done & 1 : 0;
    if (C::kPhased) rows.start(first_row, step, end);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile)
      keep_tile<C>(rows, kept, buffer + tile, first_row + u64{1} * (tile + C::kUnderWay) * step, end);
    ptx::fence_proxy_async_shared_cta();
    __syncthreads();
    if (C::kAhead == 0) rows.fetch(first_row + u64{1} * step, end);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const u32 tile_row = first_row + tile * step;
      if (rows.has_pe) {
        if constexpr (C::kPhased) {
          store_kept_pe<C>(pe, kept, tile, tile_row);
        } else {
          pe_ahead.store_and_fetch(tile_row, step);
        }
        pe.copy_from(tile_row, C::kPeSlots);
      }
      with_terms<C::kMostTerms>(p.terms, [&](auto terms) {
#pragma unroll
        for (int c = 0; c < C::kChunks; ++c)
          multiply_and_store<C, terms.kCount>(p, shared, kept.planes(buffer + tile), kept.scales(buffer + tile),
                                              w_scale[c], column + c * C::kColumns, first_column, tile_row, buffer,
                                              at.head, pe.multiplier);
      });
    }
    if (!C::kPhased && kept.count == 1) __syncthreads();  // all have read the planes
    if (C::kPhased && done + 1 < bursts.count) phase.wait_for_all();
  }
  if (C::kPhased) {  // every copy has landed before the CTA ends, also in one without rows
    for (u64& full : shared.full) wait(&full, 0);
  }
}

}  // namespace mla_fp8::sm90
