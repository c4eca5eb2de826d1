#include <array>
#include <memory>
#include <stdexcept>

#include "config/cost.h"

namespace mla_fp8 {
namespace {

constexpr int kMemoBits = 7;  // 128 slots a thread
// 2^64 / phi: Fibonacci hashing spreads close integers.
constexpr uint64_t kGoldenRatio = 0x9E3779B97F4A7C15u;

struct MemoSlot {
  Problem problem;
  Device device;
  Config config;  // tile == nullptr: the slot is empty
};
using Memo = std::array<MemoSlot, size_t{1} << kMemoBits>;

uint64_t memo_index(const Problem& p) {
  uint64_t hash = static_cast<uint64_t>(p.s);
  const auto mix = [&](auto value) { hash = (hash ^ static_cast<uint64_t>(value)) * kGoldenRatio; };
  mix(p.heads);
  mix(p.n);
  mix(p.k);
  mix(p.m);
  mix(p.op);
  mix(p.pe);
  for (const int bytes : {p.in_bytes, p.out_bytes, p.align_bytes}) mix(bytes);
  return hash >> (64 - kMemoBits);
}

std::string no_kernel(const Problem& p, const Device& d) {
  return "no kernel for " + describe(p) + " on " + describe(d);
}

[[noreturn]] void refuse(const Problem& p, const Device& d, const std::string& reasons) {
  throw std::invalid_argument(std::string(op_name(p.op)) + ": " + no_kernel(p, d) + ": " + reasons);
}

void check(const Problem& p, const Device& d) {
  const std::string broken = broken_rules(p, d);
  if (!broken.empty()) {
    throw std::invalid_argument(std::string(op_name(p.op)) + ": " + broken + " (" + no_kernel(p, d) + ")");
  }
}

Config select_uncached(const Problem& problem, const Device& device) {
  check(problem, device);
  Config best;
  for (const Tile& tile : kTiles) {
    if (tile.op != problem.op) continue;
    const Evaluation trial = evaluate(tile, problem, device);
    if (trial.drops == 0 && (best.tile == nullptr || better(trial.config, best))) best = trial.config;
  }
  if (best.tile != nullptr) return best;
  std::string reasons;
  for (const Candidate& candidate : candidates(problem, device)) {
    if (!reasons.empty()) reasons += ". ";
    reasons += std::string(candidate.config.tile->symbol) + " " + candidate.reason;
  }
  refuse(problem, device, reasons.empty() ? "no tile of this op is compiled" : reasons);
}

}  // namespace

bool better(const Config& a, const Config& b) {
  if (a.modelled_us != b.modelled_us) return a.modelled_us < b.modelled_us;
  if (a.tile->align_bytes != b.tile->align_bytes) return a.tile->align_bytes > b.tile->align_bytes;
  if (a.tile->smem_bytes != b.tile->smem_bytes) return a.tile->smem_bytes < b.tile->smem_bytes;
  return a.tile < b.tile;  // both lie in kTiles: the earlier line
}

Config select_config(const Problem& problem, const Device& device) {
  thread_local const std::unique_ptr<Memo> memo = std::make_unique<Memo>();
  MemoSlot& slot = (*memo)[memo_index(problem)];
  if (slot.config.tile == nullptr || !(slot.problem == problem) || !(slot.device == device)) {
    // This may throw, and then the slot keeps its old answer.
    const Config config = select_uncached(problem, device);
    slot = {problem, device, config};
  }
  return slot.config;
}

Config configure(const Tile& tile, const Problem& problem, const Device& device) {
  check(problem, device);
  if (tile.op != problem.op) refuse(problem, device, std::string(tile.symbol) + " is a tile of " + op_name(tile.op));
  const Evaluation trial = evaluate(tile, problem, device);
  if (trial.drops == 0) return trial.config;
  refuse(problem, device, std::string(tile.symbol) + " " + drop_reason(trial.drops, tile, problem, device));
}

std::vector<Candidate> candidates(const Problem& problem, const Device& device) {
  check(problem, device);
  std::vector<Candidate> all;
  for (const Tile& tile : kTiles) {
    if (tile.op != problem.op) continue;
    const Evaluation trial = evaluate(tile, problem, device);
    all.push_back({trial.config, trial.cost, trial.drops == 0, drop_reason(trial.drops, tile, problem, device)});
  }
  return all;
}

}  // namespace mla_fp8
