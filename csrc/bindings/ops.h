// The ops as the dispatcher calls them, the same for CPU and CUDA: check, allocate, run. Shapes in docs of mla_fp8/ops.py.
#pragma once

#include <torch/csrc/stable/tensor_struct.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace mla_fp8::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> quantize_q_nope(Tensor q_nope, int64_t m_alignment, double amax_floor, bool zero_pad);
void quantize_q_nope_out(Tensor q_nope, int64_t m_alignment, double amax_floor, bool zero_pad, Tensor val_out,
                         Tensor scale_out);

Tensor bmm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, std::optional<int64_t> m);
void bmm_out(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, std::optional<int64_t> m, Tensor c_out);

Tensor absorb_q(Tensor q_nope, Tensor w_uk, Tensor w_uk_scale, OptionalTensor q_pe, OptionalTensor out_scale);
void absorb_q_out(Tensor q_nope, Tensor w_uk, Tensor w_uk_scale, OptionalTensor q_pe, OptionalTensor out_scale,
                  Tensor q_out);

Tensor v_up(Tensor o_latent, Tensor w_uv, Tensor w_uv_scale, OptionalTensor out_scale);
void v_up_out(Tensor o_latent, Tensor w_uv, Tensor w_uv_scale, OptionalTensor out_scale, Tensor v_out);

std::tuple<Tensor, Tensor> v_up_quantized(Tensor o_latent, Tensor w_uv, Tensor w_uv_scale);
void v_up_quantized_out(Tensor o_latent, Tensor w_uv, Tensor w_uv_scale, Tensor val_out, Tensor scale_out);

}  // namespace mla_fp8::ops
