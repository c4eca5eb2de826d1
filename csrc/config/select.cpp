#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "config/cost.h"
#include "config/fields.h"
#include "text.h"

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
  uint64_t hash = 0;
  const auto mix = [&](auto value) { hash = (hash ^ static_cast<uint64_t>(value)) * kGoldenRatio; };
  std::apply([&](auto... fields) { (mix(fields), ...); }, fields_of(p));
  return hash >> (64 - kMemoBits);
}

std::string no_kernel(const Problem& p, const Device& d) {
  return text("no kernel for ", describe(p), " on ", describe(d));
}

[[noreturn]] void refuse(const Problem& p, const Device& d, const std::string& reasons) {
  throw std::invalid_argument(text(op_name(p.op), ": ", no_kernel(p, d), ": ", reasons));
}

void check(const Problem& p, const Device& d) {
  const std::string broken = broken_rules(p, d);
  if (broken.empty()) return;
  throw std::invalid_argument(text(op_name(p.op), ": ", broken, " (", no_kernel(p, d), ")"));
}

Config select_uncached(const Problem& problem, const Device& device) {
  check(problem, device);
  Config best;
  for (const Tile& tile : kTiles) {
    if (tile.op != problem.op) continue;
    const Candidate trial = evaluate(tile, problem, device, /*explain=*/false);
    if (trial.kept && (best.tile == nullptr || better(trial.config, best))) best = trial.config;
  }
  if (best.tile != nullptr) return best;
  std::string reasons;
  for (const Candidate& candidate : candidates(problem, device)) {
    reasons += text(reasons.empty() ? "" : ". ", candidate.config.tile->symbol, " ", candidate.reason);
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
  if (tile.op != problem.op) refuse(problem, device, text(tile.symbol, " is a tile of ", op_name(tile.op)));
  const Candidate trial = evaluate(tile, problem, device, /*explain=*/true);
  if (trial.kept) return trial.config;
  refuse(problem, device, text(tile.symbol, " ", trial.reason));
}

std::vector<Candidate> candidates(const Problem& problem, const Device& device) {
  check(problem, device);
  std::vector<Candidate> all;
  for (const Tile& tile : kTiles) {
    if (tile.op == problem.op) all.push_back(evaluate(tile, problem, device, /*explain=*/true));
  }
  return all;
}

}  // namespace mla_fp8
