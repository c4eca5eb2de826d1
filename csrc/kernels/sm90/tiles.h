// The tiles that are compiled for compute capability 9.0, one line each. From a line come the
// kernel's symbol and launch bounds (kernels.cuh) and its row of the table that select_config
// chooses from (config/tile.h). What follows from a schedule's arguments stands in schedules.h; no
// tile constant stands anywhere else.
//
// X(symbol, op, (schedule), CTAs an SM, and the model's µs: start of a launch, an SM's first tile,
// its next ones, a further term of each)
//   FewRows<rows, store, tokens, warpgroups, tiles of 64 columns a warpgroup, blocks of k>
//   SharedRows<rows, store, warpgroups, chunks of 128 columns a warpgroup, stages ahead, planes>
//   OwnRows<rows, store, warpgroups, chunks of 128 columns, stages of rows a warpgroup, in phases>
//   Pipelined<rows, store, warpgroups that split, blocks of k, stages of rows, of planes>
//   KLoop<rows, store, warpgroups, stages, alignment, the only k>
#pragma once

#include "kernels/quantize_q_nope.h"
#include "kernels/sm90/schedules.h"

// clang-format off
#define MLA_FP8_SM90_TILES(X)                                                                                                        \
  X(absorb_q_few16,                 kAbsorbQ,       (FewRows<Terms<3>, Latent<2>, 16, 1, 2, 1>),             8, -0.5, 1.3, 3.1, 0.1) \
  X(absorb_q_few16_e4m3,            kAbsorbQ,       (FewRows<Terms<3>, Latent<1>, 16, 1, 2, 1>),             8, -0.6, 1.6, 2.4, 0.0) \
  X(absorb_q_few32,                 kAbsorbQ,       (FewRows<Terms<3>, Latent<0>, 32, 2, 4, 1>),             2, -1.0, 2.6, 2.4, 0.3) \
  X(absorb_q_shared128,             kAbsorbQ,       (SharedRows<Terms<3>, Latent<2>, 1, 1, 0, 4>),           3, -0.3, 1.2, 0.8, 0.5) \
  X(absorb_q_shared128_e4m3,        kAbsorbQ,       (SharedRows<Terms<3>, Latent<1>, 1, 1, 0, 4>),           3, -0.6, 1.9, 1.1, 0.3) \
  X(absorb_q_shared512,             kAbsorbQ,       (SharedRows<Terms<2>, Latent<2>, 2, 2, 2, 2>),           2, -1.0, 2.8, 0.6, 0.1) \
  X(absorb_q_shared512_e4m3,        kAbsorbQ,       (SharedRows<Terms<2>, Latent<1>, 2, 2, 2, 2>),           2, -1.3, 3.3, 1.0, 0.7) \
  X(absorb_q_own512,                kAbsorbQ,       (OwnRows<Terms<2>, Latent<2>, 2, 4, 5, 0>),              1, -1.2, 4.9, 0.4, 0.0) \
  X(absorb_q_own512_e4m3,           kAbsorbQ,       (OwnRows<Terms<2>, Latent<1>, 2, 4, 5, 0>),              1, -1.0, 4.1, 1.2, 0.7) \
  X(absorb_q_phased,                kAbsorbQ,       (OwnRows<Terms<2>, Latent<2>, 2, 4, 5, 1>),              1, 2.1, 1.3, 2.3, 0.0)  \
  X(absorb_q_kloop,                 kAbsorbQ,       (KLoop<Terms<3>, Latent<0>, 1, 4, 16>),                  1, 0.4, 1.0, 1.2, 0.3)  \
  X(absorb_q_kloop_unaligned,       kAbsorbQ,       (KLoop<Terms<3>, Latent<0>, 1, 4, 2>),                   2, 0.7, 3.0, 15.0, 0.3) \
  X(v_up_few8,                      kVUp,           (FewRows<Terms<2>, Value<2>, 8, 2, 1, 4>),               3, -0.2, 1.3, 1.9, 0.3) \
  X(v_up_few8_e4m3,                 kVUp,           (FewRows<Terms<2>, Value<1>, 8, 2, 1, 4>),               3, -0.2, 1.2, 2.2, 0.3) \
  X(v_up_few16,                     kVUp,           (FewRows<Terms<3>, Value<0>, 16, 2, 1, 4>),              2, -0.4, 1.8, 2.5, 0.5) \
  X(v_up_few32,                     kVUp,           (FewRows<Terms<2>, Value<0>, 32, 2, 1, 4>),              2, 1.1, 0.5, 3.3, 1.0)  \
  X(v_up_piped64,                   kVUp,           (Pipelined<Terms<2>, Value<0>, 2, 4, 2, 7>),             1, 1.0, 1.1, 0.0, 0.8)  \
  X(v_up_kloop,                     kVUp,           (KLoop<Terms<3>, Value<0>, 2, 4, 16>),                   1, 2.3, 0.5, 0.0, 0.7)  \
  X(v_up_kloop_unaligned,           kVUp,           (KLoop<Terms<3>, Value<0>, 1, 4, 2>),                    2, 4.2, 1.5, 3.9, 0.3)  \
  X(bmm_k128,                       kBmm,           (KLoop<Taken, Plain, 1, 1, 16, 128>),                    4, -0.1, 0.5, 0.0, 0.0) \
  X(bmm_kloop64,                    kBmm,           (KLoop<Taken, Plain, 1, 4, 16>),                         2, -0.1, 1.0, 0.3, 0.0) \
  X(bmm_kloop128,                   kBmm,           (KLoop<Taken, Plain, 2, 4, 16>),                         1, 0.0, 1.0, 0.3, 0.0)  \
  X(bmm_kloop_unaligned,            kBmm,           (KLoop<Taken, Plain, 1, 4, 1>),                          2, 0.7, 3.0, 15.0, 0.0) \
  X(quantize_q_nope_m32,            kQuantizeQNope, (quantize_q_nope::Rows<16>),                             8, 0.0, 0.0, 0.0, 0.0)  \
  X(quantize_q_nope_m32_unaligned,  kQuantizeQNope, (quantize_q_nope::Rows<2>),                              8, 0.0, 0.0, 0.0, 0.0)
// clang-format on
