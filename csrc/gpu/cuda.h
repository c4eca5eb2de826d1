// The CUDA side of each op: arguments that passed every check -> one kernel on `stream`.
// Throws std::runtime_error whose message starts with the op's name.
#pragma once

#include "args.h"

namespace mla_fp8::cuda {

void quantize_q_nope(const QuantizeArgs& args, int device_index, void* stream);
void bmm(const BmmArgs& args, int device_index, void* stream);
void absorb_q(const AbsorbQArgs& args, int device_index, void* stream);
void v_up(const VUpArgs& args, int device_index, void* stream);

}  // namespace mla_fp8::cuda
