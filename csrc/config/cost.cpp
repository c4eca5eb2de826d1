#include "config/cost.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "kernels/phases.h"
#include "text.h"

namespace mla_fp8 {
namespace {

constexpr double kBytesPerUsPerGbps = 1e3;  // 1 GB/s = 1000 bytes a µs
constexpr double kFlopsPerUsPerTflops = 1e6;
constexpr double kScaleBytes = 4;           // fp32
constexpr int kMaxThreads = 1024;           // of a CTA
// Of DRAM's speed, where a launch writes more than it reads and does both at any time.
constexpr double kMixedDram = 0.9;
// What a phased launch loses whose CTAs cannot all run at once: their wait, at 1.75 GHz.
constexpr double kVainWaitUs = phases::kPatienceCycles / 1.75e3;

// What the least aligned problem has.
constexpr int least_align_bytes(Op op) { return op == Op::kBmm ? 1 : 2; }

constexpr bool is_sane(const Tile& tile) {
  return tile.m >= 1 && tile.n >= kScaleGroup && tile.n % kScaleGroup == 0 && tile.threads >= 1 &&
         tile.threads <= kMaxThreads && tile.stages >= (tile.op == Op::kQuantizeQNope ? 0 : 1) &&
         tile.smem_bytes >= 0 && tile.align_bytes >= 1 && tile.align_bytes <= kVectorBytes && tile.regs >= 0;
}

constexpr bool fits_smem(const Tile& tile, const Device& d) {
  return tile.smem_bytes <= d.smem_bytes_per_cta && tile.smem_bytes + d.smem_bytes_reserved <= d.smem_bytes_per_sm;
}
constexpr bool fits_threads(const Tile& tile, const Device& d) { return tile.threads <= d.threads_per_sm; }
constexpr bool fits_registers(const Tile& tile, const Device& d) {
  return tile.regs * tile.threads <= d.registers_per_sm;
}

constexpr bool every_line_is_sane() {
  for (const Tile& tile : kTiles) {
    if (!is_sane(tile)) return false;
    for (const Tile* other = kTiles.data(); other != &tile; ++other) {
      if (std::string_view(other->symbol) == tile.symbol) return false;
    }
  }
  return true;
}

// Does every architecture have a tile that takes every supported problem of this op and output, on
// a GPU with an H100's limits?
constexpr bool is_total(Op op, int out_bytes, int terms) {
  for (const Architecture& architecture : kArchitectures) {
    bool found = false;
    for (const Tile& tile : kTiles) {
      const bool any_extent = tile.k == 0 && tile.n == kScaleGroup;
      const bool any_output = tile.out_bytes == 0 || tile.out_bytes == out_bytes;
      const bool any_terms = tile.terms >= terms;
      const bool any_alignment = tile.align_bytes <= least_align_bytes(op);
      const bool fits = fits_smem(tile, Device{}) && fits_threads(tile, Device{}) && fits_registers(tile, Device{});
      const bool runs = tile.capability == architecture.capability && tile.op == op;
      found = found || (runs && any_extent && any_terms && any_output && any_alignment && fits);
    }
    if (!found) return false;
  }
  return true;
}

static_assert(every_line_is_sane(), "a line of tiles.h has a size that no launch can have, or another line's symbol");
static_assert(is_total(Op::kQuantizeQNope, 1, 1) && is_total(Op::kBmm, 2, 1) && is_total(Op::kAbsorbQ, 2, kMostTerms) &&
                  is_total(Op::kAbsorbQ, 1, kMostTerms) && is_total(Op::kVUp, 2, kMostTerms) &&
                  is_total(Op::kVUp, 1, kMostTerms),
              "an op needs, on each architecture, a tile of 128 columns that takes every k and unaligned activations");

int64_t columns_of(const Problem& p) { return p.op == Op::kQuantizeQNope ? p.k : p.n; }

int64_t column_tiles(const Tile& tile, const Problem& p) { return columns_of(p) / tile.n; }

// Bytes that the problem itself has, each counted once.
struct Operands {
  double activations, weights, output;
};

Operands operands(const Problem& p) {
  const double rows = static_cast<double>(p.s) * p.heads;
  const double group_scales = rows * p.k / kScaleGroup * kScaleBytes;
  if (p.op == Op::kQuantizeQNope) {
    const double rows_out = static_cast<double>(rows_covered(p)) * p.heads;
    return {rows * p.k * p.in_bytes, 0, rows_out * p.k * (1 + kScaleBytes / kScaleGroup)};
  }
  const double weights = static_cast<double>(p.heads) * p.n * p.k;
  return {rows * (p.k + p.pe) * p.in_bytes + (p.op == Op::kBmm ? group_scales : 0),
          weights * (1 + kScaleBytes / (kScaleGroup * kScaleGroup)), rows * (p.n + p.pe) * p.out_bytes};
}

// Whether the tile can run the problem; `reason`, unless null, gets a clause for each rule that
// forbids it, with the values that led to it.
bool can_run(const Tile& tile, const Problem& p, const Device& d, std::string* reason) {
  bool can = true;
  const auto need = [&](bool holds, const auto&... parts) {
    if (!holds && reason != nullptr) *reason += text(reason->empty() ? "" : "; ", parts...);
    can = can && holds;
  };
  need(tile.capability == d.capability, "is for compute capability ", tile.capability / 10, ".", tile.capability % 10,
       ", the device has ", d.capability / 10, ".", d.capability % 10);
  need(fits_smem(tile, d), "needs ", tile.smem_bytes, " bytes of shared memory, the device has ", d.smem_bytes_per_cta,
       " a CTA and ", d.smem_bytes_per_sm, " an SM, of which ", d.smem_bytes_reserved, " a CTA are reserved");
  need(fits_threads(tile, d), "needs ", tile.threads, " threads, an SM has ", d.threads_per_sm);
  need(fits_registers(tile, d), "needs ", tile.threads, " x ", tile.regs, " registers, an SM has ", d.registers_per_sm);
  need(tile.align_bytes <= p.align_bytes, "needs pointers and strides aligned to ", tile.align_bytes,
       " bytes, these are aligned to ", p.align_bytes);
  need(tile.k == 0 || tile.k == p.k, "takes k = ", tile.k, " only, k is ", p.k);
  need(columns_of(p) % tile.n == 0, "makes ", tile.n, " columns at a time, which do not divide ", columns_of(p));
  need(p.terms <= tile.terms, "splits activations into ", tile.terms, " terms at most, these have ", p.terms);
  need(tile.out_bytes == 0 || tile.out_bytes == p.out_bytes, "writes ", tile.out_bytes,
       "-byte elements, the output has ", p.out_bytes, "-byte ones");
  return can;
}

int ctas_per_sm(const Tile& tile, const Device& d) {
  int ctas = std::min(d.ctas_per_sm, d.threads_per_sm / tile.threads);
  if (tile.smem_bytes > 0) ctas = std::min(ctas, d.smem_bytes_per_sm / (tile.smem_bytes + d.smem_bytes_reserved));
  if (tile.regs > 0) ctas = std::min(ctas, d.registers_per_sm / (tile.regs * tile.threads));
  return ctas;
}

// Tile, CTAs an SM, grid and waves.
Config lay_out(const Tile& tile, const Problem& p, const Device& d) {
  Config config;
  config.tile = &tile;
  config.ctas_per_sm = ctas_per_sm(tile, d);
  const int64_t row_tiles = ceil_div(rows_covered(p), tile.m);
  const int64_t columns = p.heads * column_tiles(tile, p);
  const int64_t resident =
      std::min(kMaxGridX, static_cast<int64_t>(d.num_sms) * (tile.leaves_room ? 1 : config.ctas_per_sm));
  config.tiles = row_tiles * columns;
  if (config.tiles == 0) return config;
  const int64_t most_steps = std::min(row_tiles, std::max<int64_t>(1, resident / columns));
  config.grid_x = tile.persistent ? columns * ceil_div(row_tiles, ceil_div(row_tiles, most_steps))
                                  : std::min(config.tiles, kMaxGridX);
  config.waves =
      ceil_div(ceil_div(config.grid_x, d.num_sms), config.ctas_per_sm) * ceil_div(config.tiles, config.grid_x);
  return config;
}

bool keeps_weights(const Tile& tile, const Problem& p) {
  return tile.persistent && tile.n / kScaleGroup * (p.k / kScaleGroup) <= tile.stages;
}

// Fills in modelled_bytes and modelled_us of a non-empty grid.
Cost add_cost(Config& config, const Problem& p, const Device& d) {
  const Tile& tile = *config.tile;
  const Operands bytes = operands(p);
  const double tiles_per_cta = static_cast<double>(ceil_div(config.tiles, config.grid_x));
  // Of one column tile of one head.
  const double cta_weights = bytes.weights / (static_cast<double>(p.heads) * column_tiles(tile, p));
  const double weight_reads = keeps_weights(tile, p) ? 1 : tiles_per_cta;
  const double read_at_once =
      cta_weights * std::min<double>(config.grid_x, static_cast<double>(d.num_sms) * config.ctas_per_sm);
  const double dram_weight_reads = std::min(read_at_once, bytes.weights) > d.l2_bytes ? weight_reads : 1;
  config.modelled_bytes = bytes.activations + bytes.weights * dram_weight_reads + bytes.output;

  const double l2_bytes =
      bytes.activations * column_tiles(tile, p) + cta_weights * weight_reads * config.grid_x + bytes.output;

  const double sm_ctas = static_cast<double>(ceil_div(config.grid_x, d.num_sms));
  // The tile's times are those of a block of k where it takes any k, else of all of k.
  const double blocks = tile.k == 0 ? static_cast<double>(p.k) / kScaleGroup : 1;
  const double tile_flops = p.op == Op::kQuantizeQNope ? 0 : 2.0 * tile.m * tile.n * p.k * p.terms;

  const bool is_mixed = !tile.phased && bytes.output > bytes.activations;
  const double dram_bytes = is_mixed ? config.modelled_bytes + (bytes.activations + bytes.output) * (1 / kMixedDram - 1)
                                     : config.modelled_bytes;
  Cost cost;
  cost.dram_us = dram_bytes / (d.dram_gbps * kBytesPerUsPerGbps);
  cost.l2_us = l2_bytes / (d.l2_gbps * kBytesPerUsPerGbps);
  const double further = static_cast<double>(config.waves - 1), terms_us = (p.terms - 1) * tile.term_us;
  cost.sm_us = (tile.first_us + terms_us + further * (tile.next_us + terms_us)) * blocks;
  cost.mma_us = sm_ctas * tiles_per_cta * tile_flops * d.num_sms / (d.mma_tflops * kFlopsPerUsPerTflops);
  const double overlapped_us = std::sqrt(cost.dram_us * cost.dram_us + cost.l2_us * cost.l2_us +
                                         cost.sm_us * cost.sm_us + cost.mma_us * cost.mma_us);
  const bool waits_in_vain = tile.phased && config.grid_x > static_cast<int64_t>(d.num_sms) * config.ctas_per_sm;
  // start_us was measured on one device; another may start a launch in less.
  config.modelled_us = std::max(0.0, d.launch_us + tile.start_us) + (waits_in_vain ? kVainWaitUs : 0) + overlapped_us;
  return cost;
}

}  // namespace

Candidate evaluate(const Tile& tile, const Problem& problem, const Device& device, bool explain) {
  Candidate result;
  result.config.tile = &tile;
  result.kept = can_run(tile, problem, device, explain ? &result.reason : nullptr);
  if (!result.kept) return result;
  result.config = lay_out(tile, problem, device);
  if (result.config.grid_x != 0) result.cost = add_cost(result.config, problem, device);
  return result;
}

}  // namespace mla_fp8
