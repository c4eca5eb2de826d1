// What one tile costs on one problem: whether it fits, its grid, bytes and time.
//
// Grid, as tile.h lays it down. columns = heads * column tiles; resident = SMs * CTAs an SM, where
// one CTA an SM counts if the tile leaves room for the next launch's CTAs.
//   persistent   columns * min(row tiles, max(1, resident / columns)) CTAs, each of which takes row
//                tiles of one column
//   others       one CTA a tile, as far as gridDim.x goes
//
// Time. A CTA keeps its weights if the stages hold them all, else it reads them again for each of
// its tiles.
//   dram  activations, weights and output once; weights again where CTAs read them again and L2
//         cannot hold them. Slower by kMixedDram for what is read and written at the same time,
//         where more is written than read, but not for a tile that does both in phases
//   l2    every byte into or out of an SM: activations once a column tile, weights once a CTA or
//         once a tile
//   sm    the busiest SM's own time: a tile's first_us, and its next_us for every further one in
//         turn, and term_us more of each for every term of the activations beyond the first; for
//         tiles that take any k these are times of a block of 128
//   mma   the busiest SM's multiply-adds, rows and columns outside the problem included
//   us    launch + the tile's start_us (never below 0) + sqrt(dram^2 + l2^2 + sm^2 + mma^2), as the
//         four overlap, but not wholly; and the wait in vain of a phased launch that is too large
//         to run at once
//
// start_us, first_us, next_us and term_us are fitted to the record of the published list
// (benchmarks/tiles.py), to 0.1 us: what two runs of it agree on.
#pragma once

#include "config/config.h"

namespace mla_fp8 {

// The tile as a candidate: of one that is not kept, config has only the tile, and the reason is
// told if `explain`.
Candidate evaluate(const Tile& tile, const Problem& problem, const Device& device, bool explain);

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Rows a head that the launch must cover.
inline int64_t rows_covered(const Problem& problem) { return problem.m > problem.s ? problem.m : problem.s; }

}  // namespace mla_fp8
