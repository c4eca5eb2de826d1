// A walk over many supported problems that checks what select_config promises. For tests: only _config links it.
#pragma once

#include <string>
#include <vector>

#include "config/config.h"

namespace mla_fp8 {

struct WalkReport {
  int64_t problems = 0;
  int64_t kept = 0, dropped = 0;      // candidates of all problems together
  int64_t failed = 0;                 // broken promises
  std::vector<std::string> failures;  // the first few of them
};

// Every combination of a few values, the extremes among them, of each extent, alignment and output type of each op.
WalkReport walk_corners(const Device& device);

// `count` random problems: small extents as often as large ones.
WalkReport walk_random(int64_t count, uint64_t seed, const Device& device);

// Nanoseconds of a select_config call whose answer is in the memo, and of one whose is not.
struct MemoTimes {
  double hit_ns, miss_ns;
};
MemoTimes time_memo(int64_t calls);

}  // namespace mla_fp8
