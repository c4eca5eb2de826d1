// One tile of a product, for the instruction set that the including file describes in a struct Isa:
//     Reg, kLanes      a vector of fp32
//     kRowTile         rows whose sums live in registers at once
//     kNarrowRows      rows up to which NarrowPanel is used
//     kPanelRegs       vectors in a row of the panel; the panel's width, kPanelRegs * kLanes,
//                      divides kMinColumns
//     load, store, broadcast, add_product (exact products only), fused_multiply_add
//     WidePanel        fp32 weights, for many rows
//     NarrowPanel      fp16 weights, converted again at each use
// and a panel format has a type Value, load(panel, i) for vector i, and
//     decode(w, n_stride, ahead, panel)   e4m3 [width][128] -> [128][width], value /
//                                         kActivationLift, NaN codes to NaN, while the weights at
//                                         `ahead` are prefetched into the caches
//
// Numerics. On every path an output element is p = sum over k ascending, then
// `acc = fma(p, a_scale * w_scale, acc)` over blocks ascending. It never depends on rows, tiles,
// threads or position, nor on the instruction set: a product of an e4m3 weight with an activation,
// e4m3, bf16 or fp16, has 15 significant bits at most, so add_product may fuse or not, and vectors
// run over columns, never over k.
//
// Cost, for M rows and N columns: M*N*K multiply-adds at 2 * kLanes a cycle; N*K weights to decode,
// 512 in about 70 cycles with AVX-512, which outweighs the products while M < 5; and N*K +
// 2*M*(N+K) bytes, which bound M = 1 on cold weights. Per tile of 128 rows at K = 128, N = 512: 87
// us of products, 27 of output conversion and write-allocate, 9 of quantization, 9 of decoding
// (AVX-512, 3.4 GHz).
#pragma once

#include "cpu/rows.h"

namespace mla_fp8::cpu {
namespace {

constexpr int64_t kCacheLineBytes = 64;
constexpr int64_t kStepsAhead = 4;  // panels; of 8 KiB with AVX-512

// Weights that will be decoded later: at the next step, into L1, and at kStepsAhead, into L2.
struct Ahead {
  const uint8_t* next;
  const uint8_t* later;
};

MLA_FP8_INLINE void prefetch(const Ahead& ahead, int64_t offset) {
  __builtin_prefetch(ahead.next + offset);
  __builtin_prefetch(ahead.later + offset, 0, 2);
}

template <class Isa>
constexpr int64_t kPanelWidth = static_cast<int64_t>(Isa::kPanelRegs) * Isa::kLanes;

// acc[0..kRows) [panel width] += (a [kRows][128] . panel [128][width]) * (a_scale[row] * w_scale)
template <class Isa, class Panel, int kRows>
MLA_FP8_INLINE void multiply_panel(const float* a, const float* a_scale, const typename Panel::Value* panel,
                                   float w_scale, bool first, float* acc, int64_t acc_stride) {
  using Reg = typename Isa::Reg;
  constexpr int kRegs = Isa::kPanelRegs;
  Reg sum[kRows][kRegs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < kRegs; ++j) sum[r][j] = Isa::broadcast(0.0f);
  for (int64_t k = 0; k < kScaleGroup; ++k) {
    Reg w[kRegs];
#pragma GCC unroll 16
    for (int j = 0; j < kRegs; ++j) w[j] = Panel::load(panel, k * kRegs + j);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Reg x = Isa::broadcast(a[r * kScaleGroup + k]);
#pragma GCC unroll 16
      for (int j = 0; j < kRegs; ++j) sum[r][j] = Isa::add_product(x, w[j], sum[r][j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Reg scale = Isa::broadcast(a_scale[r] * w_scale);
#pragma GCC unroll 16
    for (int j = 0; j < kRegs; ++j) {
      float* out = acc + r * acc_stride + j * Isa::kLanes;
      const Reg before = first ? Isa::broadcast(0.0f) : Isa::load(out);
      Isa::store(out, Isa::fused_multiply_add(sum[r][j], scale, before));
    }
  }
}

// multiply_panel for `rows` rows, 1 <= rows <= kRows.
template <class Isa, class Panel, int kRows>
MLA_FP8_INLINE void multiply_rows(int64_t rows, const float* a, const float* a_scale,
                                  const typename Panel::Value* panel, float w_scale, bool first, float* acc,
                                  int64_t acc_stride) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      multiply_rows<Isa, Panel, kRows - 1>(rows, a, a_scale, panel, w_scale, first, acc, acc_stride);
      return;
    }
  }
  multiply_panel<Isa, Panel, kRows>(a, a_scale, panel, w_scale, first, acc, acc_stride);
}

// Calls place(in, row, p, slot) for each row of the tile and each of the blocks [p_begin, p_end):
// `in` has 128 activations, whose place in scratch is `slot`, [block][row]. A row is a token whose
// neighbours are H rows away, so the ones ahead are prefetched into the cache.
template <class Place>
MLA_FP8_INLINE void each_group(const Product& product, const TileRange& range, int64_t p_begin, int64_t p_end,
                               const Place& place) {
  constexpr int64_t kBytesAhead = 2048;
  const int64_t rows = range.row_end - range.row_begin;
  const int64_t row_bytes = (p_end - p_begin) * kScaleGroup * bytes_per_element(product.x_dtype);
  const int64_t rows_ahead = row_bytes < kBytesAhead ? kBytesAhead / row_bytes : 1;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = range.row_begin + r;
    const int64_t offset = range.head * product.x_stride[1] + row * product.x_stride[0] + p_begin * kScaleGroup;
    const void* in = element(product.x, product.x_dtype, offset);
    if (r + rows_ahead < rows) {
      const auto* ahead =
          static_cast<const char*>(in) + rows_ahead * product.x_stride[0] * bytes_per_element(product.x_dtype);
      for (int64_t byte = 0; byte < row_bytes; byte += kCacheLineBytes) __builtin_prefetch(ahead + byte);
    }
    for (int64_t p = p_begin; p < p_end; ++p) {
      place(element(in, product.x_dtype, (p - p_begin) * kScaleGroup), row, p, (p - p_begin) * rows + r);
    }
  }
}

// Blocks [p_begin, p_end) of the rows, as lifted values with a scale each, into scratch.a and
// scratch.a_scale.
MLA_FP8_INLINE void load_activations(const Product& product, const TileRange& range, int64_t p_begin, int64_t p_end,
                                     Scratch& scratch) {
  each_group(product, range, p_begin, p_end, [&](const void* in, int64_t row, int64_t p, int64_t slot) {
    float* x = scratch.a + slot * kScaleGroup;
    load_row(in, product.x_dtype, kScaleGroup, x);
    if (product.x_dtype == Dtype::kE4m3) {
      for (int64_t k = 0; k < kScaleGroup; ++k) x[k] *= kActivationLift;
      scratch.a_scale[slot] = product.x_scale[range.head * product.x_scale_stride[1] + row * product.x_scale_stride[0] +
                                              p * product.x_scale_stride[2]];
    } else if (product.terms > 1) {
      const float scale = range_scale(x);
      for (int64_t k = 0; k < kScaleGroup; ++k) x[k] *= kActivationLift / scale;
      scratch.a_scale[slot] = scale;
    } else {
      scratch.a_scale[slot] = quantize_lifted(x);
    }
  });
}

// q_pe leaves, beside a head's first columns.
MLA_FP8_INLINE void store_pe(const Product& product, const TileRange& range) {
  if (product.pe == 0 || range.n_begin != 0) return;
  const float reciprocal = product.out_scale != nullptr ? 1.0f / *product.out_scale : 1.0f;
  for (int64_t row = range.row_begin; row < range.row_end; ++row) {
    const void* pe =
        element(product.q_pe, product.x_dtype, range.head * product.q_pe_stride[1] + row * product.q_pe_stride[0]);
    void* out = element(product.out, product.out_dtype,
                        range.head * product.out_stride[1] + row * product.out_stride[0] + product.n);
    if (product.out_dtype == product.x_dtype) {
      std::memcpy(out, pe, static_cast<size_t>(product.pe * bytes_per_element(product.x_dtype)));
      continue;
    }
    for (int64_t begin = 0; begin < product.pe; begin += kScaleGroup) {
      const int64_t count = product.pe - begin < kScaleGroup ? product.pe - begin : kScaleGroup;
      float x[kScaleGroup];
      load_row(element(pe, product.x_dtype, begin), product.x_dtype, count, x);
      store_row(x, count, element(out, product.out_dtype, begin), product.out_dtype, reciprocal);
    }
  }
}

// The accumulators leave.
MLA_FP8_INLINE void store_tile(const Product& product, const TileRange& range, const Scratch& scratch) {
  const int64_t columns = range.n_end - range.n_begin;
  const float reciprocal = product.out_scale != nullptr ? 1.0f / *product.out_scale : 1.0f;
  for (int64_t row = range.row_begin; row < range.row_end; ++row) {
    const float* x = scratch.acc + (row - range.row_begin) * columns;
    const int64_t row_offset = range.head * product.out_stride[1] + row * product.out_stride[0];
    void* out = element(product.out, product.out_dtype, row_offset + range.n_begin);
    if (product.out_row_scale != nullptr) {
      const float scale = group_scale(x, kAmaxFloor);
      product.out_row_scale[range.head * product.out_row_scale_stride[1] + row * product.out_row_scale_stride[0]] =
          scale;
      store_codes(x, columns, 1.0f / scale, static_cast<uint8_t*>(out));
    } else {
      store_row(x, columns, out, product.out_dtype, reciprocal);
    }
  }
}

struct Step {
  int64_t p, column;
};

// With keep_blocks a panel's columns are read from end to end (p varies fastest), otherwise one
// block at a time (the column varies fastest).
template <class Isa>
MLA_FP8_INLINE Step step_at(int64_t step, int64_t blocks, int64_t panels, bool keep_blocks) {
  if (keep_blocks) return {step % blocks, step / blocks * kPanelWidth<Isa>};
  return {step / panels, step % panels * kPanelWidth<Isa>};
}

// The weights of a step; of the next head's first steps, where the tile has no more.
template <class Isa>
MLA_FP8_INLINE const uint8_t* weights_at(const Product& product, const TileRange& range, int64_t i, bool keep_blocks) {
  const int64_t blocks = product.k / kScaleGroup;
  const int64_t panels = (range.n_end - range.n_begin) / kPanelWidth<Isa>;
  const bool beyond = i >= blocks * panels;
  const int64_t head = beyond && range.head + 1 < product.heads ? range.head + 1 : range.head;
  const Step step = step_at<Isa>(beyond ? (i - blocks * panels) % (blocks * panels) : i, blocks, panels, keep_blocks);
  return product.w + head * product.w_stride[0] + (range.n_begin + step.column) * product.w_stride[1] +
         step.p * kScaleGroup;
}

MLA_FP8_INLINE float weight_scale(const Product& product, int64_t head, int64_t n, int64_t p) {
  return product.w_scale[head * product.w_scale_stride[0] + n / kScaleGroup * product.w_scale_stride[1] +
                         p * product.w_scale_stride[2]];
}

template <class Isa, class Panel>
MLA_FP8_INLINE void multiply_tile(const Product& product, const TileRange& range, Scratch& scratch) {
  const int64_t rows = range.row_end - range.row_begin;
  const int64_t columns = range.n_end - range.n_begin;
  const int64_t blocks = product.k / kScaleGroup;
  const int64_t panels = columns / kPanelWidth<Isa>;
  const bool keep_blocks = rows * blocks <= kMaxBlocks * kScratchRows;
  auto* panel = reinterpret_cast<typename Panel::Value*>(scratch.panel);
  if (keep_blocks) load_activations(product, range, 0, blocks, scratch);
  for (int64_t i = 0; i < blocks * panels; ++i) {
    const Step step = step_at<Isa>(i, blocks, panels, keep_blocks);
    const uint8_t* w = weights_at<Isa>(product, range, i, keep_blocks);
    const Ahead ahead = {weights_at<Isa>(product, range, i + 1, keep_blocks),
                         weights_at<Isa>(product, range, i + kStepsAhead, keep_blocks)};
    const int64_t slot = keep_blocks ? step.p * rows : 0;
    if (!keep_blocks && step.column == 0) load_activations(product, range, step.p, step.p + 1, scratch);
    Panel::decode(w, product.w_stride[1], ahead, panel);
    const float w_scale = weight_scale(product, range.head, range.n_begin + step.column, step.p);
    for (int64_t row = 0; row < rows; row += Isa::kRowTile) {
      multiply_rows<Isa, Panel, Isa::kRowTile>(rows - row, scratch.a + (slot + row) * kScaleGroup,
                                               scratch.a_scale + slot + row, panel, w_scale, step.p == 0,
                                               scratch.acc + row * columns + step.column, columns);
    }
  }
}

template <class Isa>
void run_tile(const Product& product, const TileRange& range, Scratch& scratch) {
  if (range.row_end - range.row_begin <= Isa::kNarrowRows) {
    multiply_tile<Isa, typename Isa::NarrowPanel>(product, range, scratch);
  } else {
    multiply_tile<Isa, typename Isa::WidePanel>(product, range, scratch);
  }
  store_tile(product, range, scratch);
  store_pe(product, range);
}

}  // namespace
}  // namespace mla_fp8::cpu
