// select_config says which compiled tile runs a problem, and on what grid. It is pure, total over
// supported problems, and memoised.
//
// A candidate is a line of the compiled-tile table (tile.h). For each one the cost model (cost.h)
// says whether it can run and how long it should take. The least modelled time wins; among equals
// the wider access, then the smaller shared memory, then the earlier line. Nothing here needs torch
// or CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "config/tile.h"  // Op, Tile, kTiles

namespace mla_fp8 {

inline constexpr int64_t kMaxPaddedRows = int64_t{1} << 32;  // of m
inline constexpr int64_t kMaxTokens = int64_t{1} << 48;  // of rows * heads; products stay in int64
inline constexpr int64_t kMaxGridX = 2147483647;  // CUDA's limit of gridDim.x

struct Problem {
  Op op = Op::kAbsorbQ;
  int64_t s = 0;  // rows a head: S, or m for bmm
  int64_t heads = 1;  // H, or B for bmm
  // Columns of the product: R for absorb_q, V for v_up. quantize_q_nope ignores it.
  int64_t n = kScaleGroup;
  int64_t k = kScaleGroup;  // columns of the activations: D for absorb_q, R for v_up
  int64_t pe = 0;  // rope columns appended by absorb_q
  int64_t m = 0;  // rows that quantize_q_nope writes, zero padding included; 0 means s
  int in_bytes = 2;  // an activation element: 2, or 1 for bmm
  // e4m3 terms that an activation becomes: 1, FP8; 2 of bf16 or 3 of fp16, exact.
  int terms = 1;
  int out_bytes = 2;  // an output element: 2 or 1
  // The greatest power of 2, at most 16, that divides every pointer and every stride in bytes, but
  // for those of the weights.
  int align_bytes = 16;
};

// Limits and speeds; the defaults are an H100 SXM's. Speeds only rank candidates.
struct Device {
  int num_sms = 132;
  int smem_bytes_per_cta = 232448;  // opt-in maximum: 227 KiB
  int smem_bytes_per_sm = 233472;  // 228 KiB
  int smem_bytes_reserved = 1024;  // taken by the system from each CTA
  int threads_per_sm = 2048;
  int registers_per_sm = 65536;
  int ctas_per_sm = 32;
  double dram_gbps = 3000;
  double l2_gbps = 5500;
  double l2_bytes = 50e6;
  double mma_tflops = 1400;  // FP8, dense, sustained
  double launch_us = 1.3;  // an empty kernel on an H100, as measured
};

// All that a launcher needs: symbol, threads and smem_bytes are the tile's. grid_x = 0 means that
// nothing is launched.
struct Config {
  const Tile* tile = nullptr;
  int64_t grid_x = 0;  // CTAs; gridDim.y and gridDim.z are 1
  int64_t tiles = 0;  // row tiles x heads x column tiles
  // Tiles that the busiest SM makes one after another. CTAs that run on it at once count as one.
  int64_t waves = 0;
  int ctas_per_sm = 0;
  double modelled_bytes = 0;  // from and to DRAM
  double modelled_us = 0;
};

// What modelled_us is made of (cost.h). The largest is what bounds the tile.
struct Cost {
  double dram_us = 0, l2_us = 0, sm_us = 0, mma_us = 0;
};

struct Candidate {
  Config config;
  Cost cost;
  bool kept = false;
  std::string reason;  // why it was dropped; empty if kept
};

const char* op_name(Op op);

// Every rule that the problem or the device breaks, with its value; empty if they are supported.
std::string broken_rules(const Problem& problem, const Device& device);

// Throws std::invalid_argument, naming op, extents, device limits and every reason. A repeated
// problem is answered from a bounded cache of the calling thread.
Config select_config(const Problem& problem, const Device& device = {});

// The config of one given tile, for comparing tiles. Throws as select_config does if the tile
// cannot run the problem.
Config configure(const Tile& tile, const Problem& problem, const Device& device = {});

// Every tile of the op in table order. Throws only if the problem itself is unsupported.
std::vector<Candidate> candidates(const Problem& problem, const Device& device = {});

// True if `a` is to be preferred to `b`: the one total order that selection uses.
bool better(const Config& a, const Config& b);

bool operator==(const Problem& a, const Problem& b);
bool operator==(const Device& a, const Device& b);
std::string describe(const Problem& problem);
std::string describe(const Device& device);

}  // namespace mla_fp8
