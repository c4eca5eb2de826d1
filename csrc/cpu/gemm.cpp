// The ops: a product, or rows to quantize, is cut into tiles for the thread pool.
#include "cpu/gemm.h"

#include "cpu/kernels.h"

namespace mla_fp8::cpu {
namespace {

// Enough for as many cores. More tiles would repeat the quantization of rows.
constexpr int64_t kMinTiles = 64;
// Multiply-adds, about 5 us: less is not worth a second thread.
constexpr int64_t kGrainWork = 1 << 18;
constexpr int64_t kDecodeWork = 8;     // multiply-adds that take as long as decoding a weight
constexpr int64_t kQuantizeRows = 16;  // rows of a work item of quantize_q_nope
constexpr int64_t kQuantizeGrainValues = 1 << 15;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

struct Plan {
  const Product* product;
  int64_t tile_rows, tile_columns, row_tiles, column_tiles;
};

void run_tiles(int64_t begin, int64_t end, void* context) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const Product& product = *plan.product;
  const Kernels& kernels = best_kernels();
  Scratch& scratch = thread_scratch();
  for (int64_t tile = begin; tile < end; ++tile) {  // row tiles fastest: they share their weights
    TileRange range;
    range.row_begin = tile % plan.row_tiles * plan.tile_rows;
    range.row_end = range.row_begin + plan.tile_rows < product.s ? range.row_begin + plan.tile_rows : product.s;
    range.n_begin = tile / plan.row_tiles % plan.column_tiles * plan.tile_columns;
    range.n_end = range.n_begin + plan.tile_columns < product.n ? range.n_begin + plan.tile_columns : product.n;
    range.head = tile / plan.row_tiles / plan.column_tiles;
    kernels.run_tile(product, range, scratch);
  }
}

struct QuantizePlan {
  const QuantizeArgs* args;
  int64_t rows, row_tiles;
};

void run_quantize(int64_t begin, int64_t end, void* context) {
  const QuantizePlan& plan = *static_cast<const QuantizePlan*>(context);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row_begin = tile % plan.row_tiles * kQuantizeRows;
    const int64_t row_end = row_begin + kQuantizeRows < plan.rows ? row_begin + kQuantizeRows : plan.rows;
    best_kernels().quantize_rows(*plan.args, tile / plan.row_tiles, row_begin, row_end);
  }
}

}  // namespace

void multiply(const Product& product, const ParallelFor& parallel_for) {
  if (product.heads == 0 || product.s == 0 || product.n == 0) return;
  Plan plan;
  plan.product = &product;
  plan.tile_rows = ceil_div(product.s, ceil_div(product.s, kScratchRows));
  plan.row_tiles = ceil_div(product.s, plan.tile_rows);
  plan.tile_columns = kMaxColumns;
  const int64_t min_columns = product.out_row_scale != nullptr ? kScaleGroup : kMinColumns;
  while (plan.tile_columns > min_columns &&
         product.heads * plan.row_tiles * ceil_div(product.n, plan.tile_columns) < kMinTiles) {
    plan.tile_columns /= 2;
  }
  if (product.out_row_scale != nullptr) plan.tile_columns = kScaleGroup;
  plan.column_tiles = ceil_div(product.n, plan.tile_columns);
  const int64_t columns = plan.tile_columns < product.n ? plan.tile_columns : product.n;
  const int64_t tile_work = columns * product.k * (plan.tile_rows + kDecodeWork);
  const int64_t grain = kGrainWork / tile_work > 1 ? kGrainWork / tile_work : 1;
  parallel_for(product.heads * plan.row_tiles * plan.column_tiles, grain, run_tiles, &plan);
}

void quantize_q_nope(const QuantizeArgs& args, const ParallelFor& parallel_for) {
  const int64_t rows = args.zero_pad ? args.m : args.s;
  if (rows == 0 || args.h == 0) return;
  QuantizePlan plan{&args, rows, ceil_div(rows, kQuantizeRows)};
  const int64_t grain = kQuantizeGrainValues / (kQuantizeRows * args.k);
  parallel_for(args.h * plan.row_tiles, grain > 1 ? grain : 1, run_quantize, &plan);
}

}  // namespace mla_fp8::cpu
