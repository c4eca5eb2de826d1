// The ops as the dispatcher calls them, the same for CPU and CUDA: check, allocate, run. Shapes in docs of mla_fp8/ops.py.
#pragma once

#include <torch/csrc/stable/tensor_struct.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace mla_fp8::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> quantize_q_nope(const Tensor& q_nope, int64_t m_alignment, double amax_floor, bool zero_pad);
void quantize_q_nope_out(const Tensor& q_nope, int64_t m_alignment, double amax_floor, bool zero_pad,
                         const Tensor& val_out, const Tensor& scale_out);

Tensor bmm(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale, std::optional<int64_t> m);
void bmm_out(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale, std::optional<int64_t> m,
             const Tensor& c_out);

Tensor absorb_q(const Tensor& q_nope, const Tensor& w_uk, const Tensor& w_uk_scale, const OptionalTensor& q_pe,
                const OptionalTensor& out_scale);
void absorb_q_out(const Tensor& q_nope, const Tensor& w_uk, const Tensor& w_uk_scale, const OptionalTensor& q_pe,
                  const OptionalTensor& out_scale, const Tensor& q_out);

Tensor v_up(const Tensor& o_latent, const Tensor& w_uv, const Tensor& w_uv_scale, const OptionalTensor& out_scale);
void v_up_out(const Tensor& o_latent, const Tensor& w_uv, const Tensor& w_uv_scale, const OptionalTensor& out_scale,
              const Tensor& v_out);

std::tuple<Tensor, Tensor> v_up_quantized(const Tensor& o_latent, const Tensor& w_uv, const Tensor& w_uv_scale);
void v_up_quantized_out(const Tensor& o_latent, const Tensor& w_uv, const Tensor& w_uv_scale, const Tensor& val_out,
                        const Tensor& scale_out);

}  // namespace mla_fp8::ops
