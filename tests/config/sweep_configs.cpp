// Checks what select_config promises on many supported problems, for test_config.py. Each line of
// output is a JSON object.
//     sweep_configs corners
//         Every combination of extreme and common extents, alignments and outputs.
//     sweep_configs random COUNT SEED THREADS SMEM
//         COUNT random problems, small extents as often as large ones, in each of THREADS threads;
//         on a device of SMEM bytes a CTA.
//     sweep_configs memo CALLS
//         Nanoseconds of a call whose answer is remembered, and of one whose is not.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "config/cost.h"

using namespace mla_fp8;

namespace {

constexpr size_t kFailuresShown = 20;
__extension__ using Wide = __int128;

struct Report {
  int64_t problems = 0;
  int64_t kept = 0, dropped = 0;  // candidates of all problems together
  int64_t failed = 0;  // broken promises
  std::vector<std::string> failures;  // the first few of them

  std::string json() const {
    std::string told;
    for (const std::string& failure : failures) told += (told.empty() ? "\"" : ", \"") + failure + "\"";
    return "{\"problems\": " + std::to_string(problems) + ", \"kept\": " + std::to_string(kept) +
           ", \"dropped\": " + std::to_string(dropped) + ", \"failed\": " + std::to_string(failed) +
           ", \"failures\": [" + told + "]}";
  }
};

// Counts broken promises and words the first of them.
class Checker {
 public:
  Checker(const Device& device, Report& report) : device_(device), report_(report) {}

  void check(const Problem& problem) {
    problem_ = &problem;
    ++report_.problems;
    try {
      check_candidates(candidates(problem, device_), select_config(problem, device_));
    } catch (const std::exception& error) {
      fail(error.what());
    }
  }

 private:
  void check_candidates(const std::vector<Candidate>& all, const Config& winner) {
    bool winner_seen = false;
    for (const Candidate& candidate : all) {
      expect(candidate.kept == candidate.reason.empty(), "a dropped candidate and only that carries a reason");
      ++(candidate.kept ? report_.kept : report_.dropped);
      if (!candidate.kept) continue;
      check_kept(candidate.config);
      expect(winner.modelled_us <= candidate.config.modelled_us, "the winner is the least modelled time");
      expect(!better(candidate.config, winner), "the winner is first in the total order");
      winner_seen = winner_seen || candidate.config.tile == winner.tile;
    }
    expect(winner_seen, "the winner is a kept candidate");
    const Config again = select_config(*problem_, device_);
    expect(again.tile == winner.tile && again.grid_x == winner.grid_x, "the same problem has the same answer");
  }

  void check_kept(const Config& config) {
    const Problem& p = *problem_;
    const Tile& tile = *config.tile;
    expect(tile.op == p.op, "the tile is of this op");
    expect(tile.capability == device_.capability, "the tile is of this architecture");
    expect(tile.stages >= 1 || p.op == Op::kQuantizeQNope, "a product has at least one stage");
    expect(tile.out_bytes == 0 || tile.out_bytes == p.out_bytes, "the output type is the tile's");
    expect(tile.smem_bytes <= device_.smem_bytes_per_cta, "shared memory fits a CTA");
    expect(tile.align_bytes <= p.align_bytes, "alignment is met");
    expect(config.ctas_per_sm >= 1, "a CTA fits an SM");
    expect(config.ctas_per_sm * Wide{tile.smem_bytes} <= device_.smem_bytes_per_sm, "shared memory fits an SM");
    expect(config.ctas_per_sm * Wide{tile.threads} <= device_.threads_per_sm, "threads fit an SM");
    const int64_t columns = p.op == Op::kQuantizeQNope ? p.k : p.n;
    const int64_t rows = p.m > p.s ? p.m : p.s;
    const Wide tile_area = Wide{tile.m} * tile.n;
    expect(config.tiles * tile_area >= Wide{rows} * columns * p.heads, "tiles cover the output");
    expect(config.tiles * tile_area <= Wide{rows + tile.m - 1} * columns * p.heads, "no tile lies outside the output");
    const int64_t grid_step = tile.persistent ? columns / tile.n * p.heads : 1;
    expect(config.grid_x % grid_step == 0, "a persistent CTA stays in its column");
    expect((config.grid_x == 0) == (rows == 0), "an empty grid for no rows, and only then");
    expect(config.grid_x >= 0 && config.grid_x <= config.tiles && config.grid_x <= kMaxGridX, "the grid is in range");
    expect(Wide{config.waves} * config.ctas_per_sm * device_.num_sms >= config.tiles, "waves cover the tiles");
    expect(rows == 0 ? config.modelled_us == 0 : config.modelled_us > 0, "a launch takes time");
  }

  void expect(bool holds, const char* promise) {
    if (!holds) fail(promise);
  }
  void fail(const std::string& what) {
    ++report_.failed;
    if (report_.failures.size() >= kFailuresShown) return;
    report_.failures.push_back(std::string(op_name(problem_->op)) + " " + describe(*problem_) + ": " + what);
  }

  const Device& device_;
  Report& report_;
  const Problem* problem_ = nullptr;
};

// Values that are legal for the op, out of the few that a field can have.
struct Choices {
  std::vector<int64_t> pe, out_bytes, align_bytes;
};

Choices choices(Op op) {
  Choices c{{0}, {2}, {2, 4, 8, 16}};
  if (op == Op::kQuantizeQNope) c.out_bytes = {1};
  if (op == Op::kBmm) c.align_bytes = {1, 2, 4, 8, 16};
  if (op == Op::kAbsorbQ) c.pe = {0, kPeStep, 64, kMaxPe};
  if (op == Op::kAbsorbQ || op == Op::kVUp) c.out_bytes = {2, 1};
  return c;
}

Problem problem_of(Op op, int64_t s, int64_t heads, int64_t n, int64_t k) {
  Problem p;
  p.op = op;
  p.s = s;
  p.heads = heads;
  p.n = n;
  p.k = k;
  p.in_bytes = op == Op::kBmm ? 1 : 2;
  return p;
}

constexpr Op kOps[] = {Op::kQuantizeQNope, Op::kBmm, Op::kAbsorbQ, Op::kVUp};

Report sweep_corners(const Device& device) {
  Report report;
  Checker checker(device, report);
  for (const Op op : kOps) {
    const Choices c = choices(op);
    for (const int64_t pe : c.pe)
      for (const int64_t out_bytes : c.out_bytes)
        for (const int64_t align_bytes : c.align_bytes)
          for (const int64_t s : {0, 1, 2, 17, 64, 127, 128, 129, 255, 257, 4097, 29128, 2147483647})
            for (const int64_t heads : {1, 2, 3, 16, 128, 131, 131072})
              for (const int64_t n : {128, 256, 384, 512, 640, 1536, 16256, 16384})
                for (const int64_t k : {128, 256, 384, 512, 640, 7168, 16384}) {
                  Problem p = problem_of(op, s, heads, n, k);
                  p.pe = pe;
                  p.out_bytes = static_cast<int>(out_bytes);
                  p.align_bytes = static_cast<int>(align_bytes);
                  checker.check(p);
                }
  }
  return report;
}

Report sweep_random(int64_t count, uint64_t seed, const Device& device) {
  Report report;
  Checker checker(device, report);
  std::mt19937_64 random(seed);
  const auto below = [&](int64_t bound) { return static_cast<int64_t>(random() % static_cast<uint64_t>(bound)); };
  const auto pick = [&](const std::vector<int64_t>& values) { return values[below(values.size())]; };
  // Small ones as often as large ones.
  const auto log_uniform = [&](int bits) { return below(int64_t{1} << (below(bits) + 1)); };
  for (int64_t i = 0; i < count; ++i) {
    const Op op = kOps[below(4)];
    const Choices c = choices(op);
    Problem p = problem_of(op, log_uniform(31), 1 + log_uniform(16), kScaleGroup * (1 + below(128)),
                           kScaleGroup * (1 + below(128)));
    p.pe = p.op == Op::kAbsorbQ ? kPeStep * below(kMaxPe / kPeStep + 1) : 0;
    p.out_bytes = static_cast<int>(pick(c.out_bytes));
    p.align_bytes = static_cast<int>(pick(c.align_bytes));
    if (op == Op::kQuantizeQNope && below(2) == 1) p.m = ceil_div(p.s, 256) * 256;
    checker.check(p);
  }
  return report;
}

double ns_per_call(int64_t calls, int64_t distinct) {
  Problem p = problem_of(Op::kAbsorbQ, 1, 128, 512, 128);
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < calls; ++i) {
    p.s = i % distinct;
    select_config(p);
  }
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / calls;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  const auto number = [&](int i) { return std::strtoll(argv[i], nullptr, 10); };
  if (what == "corners" && argc == 2) {
    std::puts(sweep_corners(Device{}).json().c_str());
  } else if (what == "random" && argc == 6) {
    Device device;
    device.smem_bytes_per_cta = static_cast<int>(number(5));
    std::vector<Report> reports(number(4));
    std::vector<std::thread> threads;
    for (Report& report : reports) {
      threads.emplace_back([&] { report = sweep_random(number(2), number(3), device); });
    }
    for (std::thread& thread : threads) thread.join();
    for (const Report& report : reports) std::puts(report.json().c_str());
  } else if (what == "memo" && argc == 3) {
    std::printf("{\"hit_ns\": %f, \"miss_ns\": %f}\n", ns_per_call(number(2), 4), ns_per_call(number(2), kMaxRows));
  } else {
    return 2;
  }
}
