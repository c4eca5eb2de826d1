// Registers torch.ops.mla_fp8. One set of functions serves the CPU and the CUDA dispatch key; the
// fakes are in mla_fp8/fake.py.
#include <torch/csrc/stable/library.h>

#include <string>

#include "bindings/ops.h"

namespace {

namespace ops = mla_fp8::ops;
using torch::stable::Tensor;

// An op's two overloads as the dispatcher calls them: new tensors for its results, or given ones,
// which come last.
template <auto op, typename = decltype(op)>
struct Overloads;

template <auto op, typename R, typename... In>
struct Overloads<op, R (*)(const Tensor*, In...)> {
  static R make(In... in) { return op(nullptr, in...); }
  static void out(In... in, const Tensor& given) { op(&given, in...); }
};

template <auto op, typename R, typename... In>
struct Overloads<op, R (*)(const Tensor*, const Tensor*, In...)> {
  static R make(In... in) { return op(nullptr, nullptr, in...); }
  static void out(In... in, const Tensor& first, const Tensor& second) { op(&first, &second, in...); }
};

#define MAKE(op) TORCH_BOX(&Overloads<&ops::op>::make)
#define OUT(op) TORCH_BOX(&Overloads<&ops::op>::out)

const struct {
  std::string schema;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);
} kOverloads[] = {
    {"quantize_q_nope(Tensor q_nope, *, int m_alignment=256, float amax_floor=1e-4, bool zero_pad=True) "
     "-> (Tensor q_val, Tensor q_scale)",
     MAKE(quantize_q_nope)},
    {"quantize_q_nope.out(Tensor q_nope, *, int m_alignment=256, float amax_floor=1e-4, bool zero_pad=True, "
     "Tensor(a!) val_out, Tensor(b!) scale_out) -> ()",
     OUT(quantize_q_nope)},
    {"bmm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *, SymInt? m=None) -> Tensor", MAKE(bmm)},
    {"bmm.out(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *, SymInt? m=None, Tensor(a!) c_out) -> ()",
     OUT(bmm)},
    {"absorb_q(Tensor q_nope, Tensor w_uk, Tensor w_uk_scale, Tensor? q_pe=None, Tensor? out_scale=None, *, "
     "bool fp8_activations=False) -> Tensor",
     MAKE(absorb_q)},
    {"absorb_q.out(Tensor q_nope, Tensor w_uk, Tensor w_uk_scale, Tensor? q_pe=None, Tensor? out_scale=None, *, "
     "bool fp8_activations=False, Tensor(a!) q_out) -> ()",
     OUT(absorb_q)},
    {"v_up(Tensor o_latent, Tensor w_uv, Tensor w_uv_scale, Tensor? out_scale=None, *, "
     "bool fp8_activations=False) -> Tensor",
     MAKE(v_up)},
    {"v_up.out(Tensor o_latent, Tensor w_uv, Tensor w_uv_scale, Tensor? out_scale=None, *, "
     "bool fp8_activations=False, Tensor(a!) v_out) -> ()",
     OUT(v_up)},
    {"v_up_quantized(Tensor o_latent, Tensor w_uv, Tensor w_uv_scale, *, bool fp8_activations=False) "
     "-> (Tensor v_val, Tensor v_scale)",
     MAKE(v_up_quantized)},
    {"v_up_quantized.out(Tensor o_latent, Tensor w_uv, Tensor w_uv_scale, *, bool fp8_activations=False, "
     "Tensor(a!) val_out, Tensor(b!) scale_out) -> ()",
     OUT(v_up_quantized)},
};

// STABLE_TORCH_LIBRARY ignores the error of a second registration and then crashes, so this asks
// for the handle itself and leaves the ops of the copy that came first in place.
class Registrar {
 public:
  Registrar() {
    if (aoti_torch_library_init_def("mla_fp8", __FILE__, __LINE__, &schemas_) != AOTI_TORCH_SUCCESS) {
      schemas_ = nullptr;
      return;
    }
    aoti_torch_library_init_impl("mla_fp8", "CPU", __FILE__, __LINE__, &cpu_);
    aoti_torch_library_init_impl("mla_fp8", "CUDA", __FILE__, __LINE__, &cuda_);
    for (const auto& [schema, boxed] : kOverloads) {
      const std::string name = schema.substr(0, schema.find('('));
      TORCH_ERROR_CODE_CHECK(aoti_torch_library_def(schemas_, schema.c_str()));
      for (TorchLibraryHandle library : {cpu_, cuda_}) {
        TORCH_ERROR_CODE_CHECK(torch_library_impl(library, name.c_str(), boxed, TORCH_ABI_VERSION));
      }
    }
  }

  ~Registrar() {
    for (TorchLibraryHandle library : {cuda_, cpu_, schemas_}) {
      if (library != nullptr) aoti_torch_delete_library_object(library);
    }
  }

 private:
  TorchLibraryHandle schemas_ = nullptr, cpu_ = nullptr, cuda_ = nullptr;
};

const Registrar registrar;

}  // namespace
