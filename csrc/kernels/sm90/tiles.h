// The tiles that are compiled for compute capability 9.0, one line each. From a line come the kernel's symbol and launch
// bounds (kernels.cu) and its row of the table that select_config chooses from (config/tile.h). What a schedule's tiles
// share is a constant beside its shared memory; no tile constant stands anywhere else.
//
// X(symbol, op, (schedule), CTAs an SM, start µs, an SM's serial µs a tile)
#pragma once

#include "kernels/absorb_q.h"
#include "kernels/bmm.h"
#include "kernels/kloop.h"
#include "kernels/quantize_q_nope.h"
#include "kernels/v_up.h"

namespace mla_fp8 {

// The type in parentheses: a macro's argument may hold commas only there.
template <class>
struct InParentheses;
template <class T>
struct InParentheses<void(T)> {
  using type = T;
};
#define MLA_FP8_SCHEDULE(schedule) mla_fp8::InParentheses<void schedule>::type

}  // namespace mla_fp8

// clang-format off
#define MLA_FP8_TILES(X)                                                                                       \
  /* D = 128: kTileN columns of a head's weights stay in shared memory; 64 rows a warpgroup. */                \
  X(absorb_q_n128,                 kAbsorbQ, (absorb_q::Config<128, 1, 2, 16>),           4, 0.05f, 0)          \
  X(absorb_q_m128,                 kAbsorbQ, (absorb_q::Config<512, 2, 2, 16>),           2, 0, 0)              \
  X(absorb_q_unaligned,            kAbsorbQ, (absorb_q::Config<128, 1, 2, 2>),            3, 0, 0)              \
  X(absorb_q_n128_e4m3,            kAbsorbQ, (absorb_q::Config<128, 1, 1, 16>),           4, -0.15f, 0)         \
  X(absorb_q_m128_e4m3,            kAbsorbQ, (absorb_q::Config<512, 2, 1, 16>),           2, 0, 0)              \
  X(absorb_q_e4m3_unaligned,       kAbsorbQ, (absorb_q::Config<128, 1, 1, 2>),            3, 0, 0)              \
  /* 64 rows quantized once for all warpgroups, and room for the next launch beside it. */                      \
  X(absorb_q_n512,                 kAbsorbQ, (absorb_q::SharedConfig<2, 2, 2>),           2, -0.1f, 0)          \
  X(absorb_q_n512_e4m3,            kAbsorbQ, (absorb_q::SharedConfig<2, 2, 1>),           2, 0.11f, 0)          \
  /* Many rows: bursts of tiles of 64 rows and 512 columns, read and written in phases. */                      \
  X(absorb_q_phased,               kAbsorbQ, (absorb_q::PhasedConfig<2>),                 1, 1.2f, 0)           \
  X(absorb_q_phased_e4m3,          kAbsorbQ, (absorb_q::PhasedConfig<1>),                 1, 0.4f, 0)           \
  /* Few rows: operands swapped; tokens, warpgroups, tiles of 64 columns a warpgroup. */                        \
  X(absorb_q_s16,                  kAbsorbQ, (absorb_q::FewConfig<16, 1, 2, 2>),          8, -0.05f, 0.5f)      \
  X(absorb_q_s32,                  kAbsorbQ, (absorb_q::FewConfig<32, 2, 4, 2>),          2, 0, 3.2f)           \
  X(absorb_q_s16_e4m3,             kAbsorbQ, (absorb_q::FewConfig<16, 1, 2, 1>),          8, -0.15f, 0.5f)      \
  X(absorb_q_s32_e4m3,             kAbsorbQ, (absorb_q::FewConfig<32, 2, 4, 1>),          2, 0.15f, 2.9f)       \
  /* Any D: 128 columns and 64 rows a warpgroup, weights through a ring that keeps them if all of K fits. */    \
  X(absorb_q_kloop,                kAbsorbQ, (kloop::Config<absorb_q::Params, 0, 4, 1, 2, 2, 16>), 1, 0, 0)     \
  X(absorb_q_kloop_unaligned,      kAbsorbQ, (kloop::Config<absorb_q::Params, 0, 4, 1, 2, 2, 2>),  2, 0, 0)     \
  X(absorb_q_kloop_e4m3,           kAbsorbQ, (kloop::Config<absorb_q::Params, 0, 4, 1, 2, 1, 16>), 1, 0, 0)     \
  X(absorb_q_kloop_e4m3_unaligned, kAbsorbQ, (kloop::Config<absorb_q::Params, 0, 4, 1, 2, 1, 2>),  2, 0, 0)     \
  /* R = 512: rows quantized once for all warpgroups, 32 columns each. */                                       \
  X(v_up_m64,                      kVUp,     (v_up::SharedConfig<2>),                     1, 0.05f, 4.55f)      \
  X(v_up_m64_e4m3,                 kVUp,     (v_up::SharedConfig<1>),                     1, 0.05f, 4.55f)      \
  /* R = 512 and few rows: operands swapped. */                                                                 \
  X(v_up_s8,                       kVUp,     (v_up::FewConfig<8, 2>),                     3, -0.25f, 1.5f)      \
  X(v_up_s16,                      kVUp,     (v_up::FewConfig<16, 2>),                    2, -0.1f, 1.8f)       \
  X(v_up_s32,                      kVUp,     (v_up::FewConfig<32, 2>),                    2, 0, 2.7f)           \
  X(v_up_s8_e4m3,                  kVUp,     (v_up::FewConfig<8, 1>),                     3, -0.3f, 1.5f)       \
  X(v_up_s16_e4m3,                 kVUp,     (v_up::FewConfig<16, 1>),                    2, -0.15f, 1.9f)      \
  X(v_up_s32_e4m3,                 kVUp,     (v_up::FewConfig<32, 1>),                    2, 0, 2.9f)           \
  X(v_up_m128,                     kVUp,     (kloop::Config<v_up::Params, 0, 4, 2, 2, 2, 16>),     1, 0, 0)     \
  X(v_up_unaligned,                kVUp,     (kloop::Config<v_up::Params, 0, 4, 1, 2, 2, 2>),      2, 0, 0)     \
  X(v_up_m128_e4m3,                kVUp,     (kloop::Config<v_up::Params, 0, 4, 2, 2, 1, 16>),     1, 0, 0)     \
  X(v_up_e4m3_unaligned,           kVUp,     (kloop::Config<v_up::Params, 0, 4, 1, 2, 1, 2>),      2, 0, 0)     \
  X(bmm_k128,                      kBmm,     (kloop::Config<bmm::Params, 128, 1, 1, 1, 2, 16>),    4, 0, 0)     \
  X(bmm_m64,                       kBmm,     (kloop::Config<bmm::Params, 0, 4, 1, 1, 2, 16>),      2, 0, 1.11f) \
  X(bmm_m128,                      kBmm,     (kloop::Config<bmm::Params, 0, 4, 2, 1, 2, 16>),      1, 0, 0)     \
  X(bmm_unaligned,                 kBmm,     (kloop::Config<bmm::Params, 0, 4, 1, 1, 2, 1>),       2, 0, 0)     \
  /* 32 rows of one group. Larger tiles were no faster anywhere that matters (docs/notes.md). */                \
  X(quantize_q_nope_m32,           kQuantizeQNope, (quantize_q_nope::Config<16>),         8, 0, 0)              \
  X(quantize_q_nope_m32_unaligned, kQuantizeQNope, (quantize_q_nope::Config<2>),          8, 0, 0)
// clang-format on
