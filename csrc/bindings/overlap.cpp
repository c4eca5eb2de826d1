// A tensor is a set of byte runs: base + sum(i_d * stride_d) + [0, run). Runs of a and b meet where integers
// d_j = i_j - i'_j, each bounded by the two extents of that stride, bring base_a - base_b + sum(d_j * stride_j) into
// (-run_a, run_b). A search over d_j, largest stride first, prunes by what the smaller strides can still reach; for
// nested layouts that leaves one or two values a level.
#include "bindings/overlap.h"

#include <algorithm>
#include <vector>

namespace mla_fp8 {
namespace {

constexpr int kSearchSteps = 100'000;  // beyond it, layouts that no view of a model has: taken as overlapping

struct Step {
  int64_t stride_bytes;
  int64_t least, most;  // range of d_j
};

struct Runs {
  int64_t base, run_bytes, end;       // end: one past the last byte
  std::vector<Step> steps;            // d_j from 0 to extent - 1
};

Runs runs_of(const View& view) {
  const int64_t bytes = bytes_per_element(view.dtype);
  Runs runs{reinterpret_cast<int64_t>(view.data), bytes, 0, {}};
  int64_t reach = 0;
  for (int64_t i = view.dim - 1; i >= 0; --i) {
    if (view.sizes[i] == 1) continue;
    const int64_t stride_bytes = view.strides[i] * bytes;
    if (stride_bytes == runs.run_bytes && runs.steps.empty()) {
      runs.run_bytes *= view.sizes[i];
    } else {
      runs.steps.push_back({stride_bytes, 0, view.sizes[i] - 1});
      reach += stride_bytes * (view.sizes[i] - 1);
    }
  }
  runs.end = runs.base + reach + runs.run_bytes;
  return runs;
}

struct Search {
  std::vector<Step> steps;
  int64_t low, high;  // exclusive bounds on the sum
  bool all_zero_counts;
  int budget = kSearchSteps;

  bool meets(size_t level, int64_t sum, bool all_zero) {
    if (--budget < 0) return true;
    if (level == steps.size()) return low < sum && sum < high && (all_zero_counts || !all_zero);
    int64_t rest_least = 0, rest_most = 0;
    for (size_t j = level + 1; j < steps.size(); ++j) {
      rest_least += steps[j].least * steps[j].stride_bytes;
      rest_most += steps[j].most * steps[j].stride_bytes;
    }
    const Step& step = steps[level];
    // Truncating division may leave one value too many at an end, never one too few.
    const int64_t from = std::max(step.least, (low - rest_most - sum) / step.stride_bytes - 1);
    const int64_t to = std::min(step.most, (high - rest_least - sum) / step.stride_bytes + 1);
    for (int64_t d = from; d <= to; ++d) {
      const int64_t next = sum + d * step.stride_bytes;
      if (next + rest_least >= high || next + rest_most <= low) continue;
      if (meets(level + 1, next, all_zero && d == 0)) return true;
    }
    return false;
  }
};

bool runs_meet(const Runs& a, const Runs& b, bool all_zero_counts) {
  Search search{a.steps, -a.run_bytes - (a.base - b.base), b.run_bytes - (a.base - b.base), all_zero_counts};
  std::vector<Step>& steps = search.steps;
  for (const Step& other : b.steps) {
    auto same = std::find_if(steps.begin(), steps.end(),
                             [&](const Step& step) { return step.stride_bytes == other.stride_bytes; });
    if (same == steps.end()) {
      steps.push_back({other.stride_bytes, -other.most, 0});
    } else {
      same->least -= other.most;
    }
  }
  steps.erase(std::remove_if(steps.begin(), steps.end(), [](const Step& step) { return step.stride_bytes == 0; }),
              steps.end());
  std::sort(steps.begin(), steps.end(), [](const Step& x, const Step& y) { return x.stride_bytes > y.stride_bytes; });
  return search.meets(0, 0, true);
}

}  // namespace

bool share_memory(const View& a, const View& b) {
  if (!a || !b || !a.same_device(b) || a.numel() == 0 || b.numel() == 0) return false;
  const Runs runs_a = runs_of(a), runs_b = runs_of(b);
  if (runs_a.end <= runs_b.base || runs_b.end <= runs_a.base) return false;
  return runs_meet(runs_a, runs_b, /*all_zero_counts=*/true);
}

bool overlaps_itself(const View& view) {
  if (view.numel() == 0) return false;
  const Runs runs = runs_of(view);
  for (const Step& step : runs.steps) {
    if (step.stride_bytes == 0) return true;
  }
  return runs_meet(runs, runs, /*all_zero_counts=*/false);
}

}  // namespace mla_fp8
