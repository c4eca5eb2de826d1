// The ops, the same for CPU and CUDA: each checks its arguments, finds a place for its results, and
// runs. The tensors to write into come first; null asks for new ones. The docstrings of
// mla_fp8/ops.py give the shapes.
#pragma once

#include <torch/csrc/stable/tensor_struct.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace mla_fp8::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TwoTensors = std::tuple<Tensor, Tensor>;

TwoTensors quantize_q_nope(const Tensor* val_out, const Tensor* scale_out, const Tensor& q_nope, int64_t m_alignment,
                           double amax_floor, bool zero_pad);
Tensor bmm(const Tensor* c_out, const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
           std::optional<int64_t> m);
Tensor absorb_q(const Tensor* q_out, const Tensor& q_nope, const Tensor& w_uk, const Tensor& w_uk_scale,
                const OptionalTensor& q_pe, const OptionalTensor& out_scale, bool fp8_activations);
Tensor v_up(const Tensor* v_out, const Tensor& o_latent, const Tensor& w_uv, const Tensor& w_uv_scale,
            const OptionalTensor& out_scale, bool fp8_activations);
TwoTensors v_up_quantized(const Tensor* val_out, const Tensor* scale_out, const Tensor& o_latent, const Tensor& w_uv,
                          const Tensor& w_uv_scale, bool fp8_activations);

}  // namespace mla_fp8::ops
