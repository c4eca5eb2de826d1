// The four ops: each fills a Gemm (or goes row by row), which is cut into tiles for the thread pool.
#include "cpu/gemm.h"

#include "cpu/kernels.h"

namespace mla_fp8::cpu {
namespace {

constexpr int64_t kMinTiles = 64;          // enough for as many cores; more tiles repeat the rows' quantization
constexpr int64_t kGrainWork = 1 << 18;    // multiply-adds, about 5 us: less is not worth a second thread
constexpr int64_t kDecodeWork = 8;         // decoding a weight costs as much as this many multiply-adds
constexpr int64_t kQuantizeRows = 16;      // rows a work item of quantize_q_nope
constexpr int64_t kQuantizeGrainValues = 1 << 15;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

struct Plan {
  const Gemm* gemm;
  int64_t tile_rows, tile_columns, row_tiles, column_tiles;
};

void run_tiles(int64_t begin, int64_t end, void* context) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const Gemm& gemm = *plan.gemm;
  const Kernels& kernels = best_kernels();
  Scratch& scratch = thread_scratch();
  for (int64_t tile = begin; tile < end; ++tile) {  // row tiles fastest: they share their weights
    TileRange range;
    range.row_begin = tile % plan.row_tiles * plan.tile_rows;
    range.row_end = range.row_begin + plan.tile_rows < gemm.rows ? range.row_begin + plan.tile_rows : gemm.rows;
    range.n_begin = tile / plan.row_tiles % plan.column_tiles * plan.tile_columns;
    range.n_end = range.n_begin + plan.tile_columns < gemm.n ? range.n_begin + plan.tile_columns : gemm.n;
    range.head = tile / plan.row_tiles / plan.column_tiles;
    kernels.run_tile(gemm, range, scratch);
  }
}

void run(const Gemm& gemm, const ParallelFor& parallel_for) {
  if (gemm.heads == 0 || gemm.rows == 0 || gemm.n == 0) return;
  Plan plan;
  plan.gemm = &gemm;
  plan.tile_rows = ceil_div(gemm.rows, ceil_div(gemm.rows, kScratchRows));
  plan.row_tiles = ceil_div(gemm.rows, plan.tile_rows);
  plan.tile_columns = kMaxColumns;
  const int64_t min_columns = gemm.group_scale != nullptr ? kScaleGroup : kMinColumns;
  while (plan.tile_columns > min_columns &&
         gemm.heads * plan.row_tiles * ceil_div(gemm.n, plan.tile_columns) < kMinTiles) {
    plan.tile_columns /= 2;
  }
  if (gemm.group_scale != nullptr) plan.tile_columns = kScaleGroup;
  plan.column_tiles = ceil_div(gemm.n, plan.tile_columns);
  const int64_t columns = plan.tile_columns < gemm.n ? plan.tile_columns : gemm.n;
  const int64_t tile_work = columns * gemm.k * (plan.tile_rows + kDecodeWork);
  const int64_t grain = kGrainWork / tile_work > 1 ? kGrainWork / tile_work : 1;
  parallel_for(gemm.heads * plan.row_tiles * plan.column_tiles, grain, run_tiles, &plan);
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

void quantize_q_nope(const QuantizeArgs& args, const ParallelFor& parallel_for) {
  const int64_t rows = args.zero_pad ? args.m : args.s;
  if (rows == 0 || args.h == 0) return;
  QuantizePlan plan{&args, rows, ceil_div(rows, kQuantizeRows)};
  const int64_t grain = kQuantizeGrainValues / (kQuantizeRows * args.k);
  parallel_for(args.h * plan.row_tiles, grain > 1 ? grain : 1, run_quantize, &plan);
}

void bmm(const BmmArgs& args, const ParallelFor& parallel_for) {
  Gemm gemm{};
  gemm.a = args.a;
  gemm.a_stride[0] = args.a_stride[0], gemm.a_stride[1] = args.a_stride[1];
  gemm.a_dtype = Dtype::kE4m3;
  gemm.a_scale = args.a_scale;
  for (int i = 0; i < 3; ++i) gemm.a_scale_stride[i] = args.a_scale_stride[i];
  gemm.w = args.b;
  gemm.w_stride[0] = args.b_stride[0], gemm.w_stride[1] = args.b_stride[1];
  gemm.w_scale = args.b_scale;
  for (int i = 0; i < 3; ++i) gemm.w_scale_stride[i] = args.b_scale_stride[i];
  gemm.out = args.c;
  gemm.out_stride[0] = args.c_stride[0], gemm.out_stride[1] = args.c_stride[1];
  gemm.out_dtype = Dtype::kBf16;
  gemm.heads = args.batch, gemm.rows = args.m, gemm.n = args.n, gemm.k = args.k;
  run(gemm, parallel_for);
}

void absorb_q(const AbsorbQArgs& args, const ParallelFor& parallel_for) {
  Gemm gemm{};
  gemm.a = args.q_nope;
  gemm.a_stride[0] = args.q_nope_stride[1], gemm.a_stride[1] = args.q_nope_stride[0];
  gemm.a_dtype = args.in_dtype;
  gemm.w = args.w_uk;
  gemm.w_stride[0] = args.w_uk_stride[0], gemm.w_stride[1] = args.w_uk_stride[1];
  gemm.w_scale = args.w_uk_scale;
  for (int i = 0; i < 3; ++i) gemm.w_scale_stride[i] = args.w_uk_scale_stride[i];
  gemm.out = args.q;
  gemm.out_stride[0] = args.q_stride[1], gemm.out_stride[1] = args.q_stride[0];
  gemm.out_dtype = args.out_dtype;
  gemm.out_scale = args.out_scale;
  gemm.pe = args.q_pe;
  gemm.pe_stride[0] = args.q_pe_stride[1], gemm.pe_stride[1] = args.q_pe_stride[0];
  gemm.heads = args.h, gemm.rows = args.s, gemm.n = args.r, gemm.k = args.d;
  gemm.p = args.q_pe != nullptr ? args.p : 0;
  run(gemm, parallel_for);
}

void v_up(const VUpArgs& args, const ParallelFor& parallel_for) {
  Gemm gemm{};
  gemm.a = args.o_latent;
  gemm.a_stride[0] = args.o_latent_stride[1], gemm.a_stride[1] = args.o_latent_stride[0];
  gemm.a_dtype = args.in_dtype;
  gemm.w = args.w_uv;
  gemm.w_stride[0] = args.w_uv_stride[0], gemm.w_stride[1] = args.w_uv_stride[1];
  gemm.w_scale = args.w_uv_scale;
  for (int i = 0; i < 3; ++i) gemm.w_scale_stride[i] = args.w_uv_scale_stride[i];
  gemm.out = args.v;
  gemm.out_stride[0] = args.v_stride[1], gemm.out_stride[1] = args.v_stride[0];
  gemm.out_dtype = args.out_dtype;
  gemm.out_scale = args.out_scale;
  gemm.group_scale = args.v_scale;
  gemm.group_scale_stride[0] = args.v_scale_stride[1], gemm.group_scale_stride[1] = args.v_scale_stride[0];
  gemm.heads = args.h, gemm.rows = args.s, gemm.n = args.v_dim, gemm.k = args.r;
  run(gemm, parallel_for);
}

}  // namespace mla_fp8::cpu
