// Registers torch.ops.mla_fp8. One set of functions serves the CPU and the CUDA key; fakes are in mla_fp8/fake.py.
#include <torch/csrc/stable/library.h>

#include "bindings/ops.h"

namespace {

// STABLE_TORCH_LIBRARY ignores the error of a second registration and then crashes, so this asks for the handle itself
// and leaves the ops of the copy that came first in place.
class Registrar {
 public:
  Registrar() {
    if (aoti_torch_library_init_def("mla_fp8", __FILE__, __LINE__, &schemas_) != AOTI_TORCH_SUCCESS) {
      schemas_ = nullptr;
      return;
    }
    define();
    aoti_torch_library_init_impl("mla_fp8", "CPU", __FILE__, __LINE__, &cpu_);
    aoti_torch_library_init_impl("mla_fp8", "CUDA", __FILE__, __LINE__, &cuda_);
    implement(cpu_);
    implement(cuda_);
  }

  ~Registrar() {
    for (TorchLibraryHandle library : {cuda_, cpu_, schemas_}) {
      if (library != nullptr) aoti_torch_delete_library_object(library);
    }
  }

 private:
  void define() {
    for (const char* schema : {
             "quantize_q_nope(Tensor q_nope, *, int m_alignment=256, float amax_floor=1e-4, bool zero_pad=True) "
             "-> (Tensor q_val, Tensor q_scale)",
             "quantize_q_nope.out(Tensor q_nope, *, int m_alignment=256, float amax_floor=1e-4, bool zero_pad=True, "
             "Tensor(a!) val_out, Tensor(b!) scale_out) -> ()",
             "bmm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *, SymInt? m=None) -> Tensor",
             "bmm.out(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *, SymInt? m=None, Tensor(a!) c_out) -> ()",
             "absorb_q(Tensor q_nope, Tensor w_uk, Tensor w_uk_scale, Tensor? q_pe=None, Tensor? out_scale=None) "
             "-> Tensor",
             "absorb_q.out(Tensor q_nope, Tensor w_uk, Tensor w_uk_scale, Tensor? q_pe=None, Tensor? out_scale=None, "
             "*, Tensor(a!) q_out) -> ()",
             "v_up(Tensor o_latent, Tensor w_uv, Tensor w_uv_scale, Tensor? out_scale=None) -> Tensor",
             "v_up.out(Tensor o_latent, Tensor w_uv, Tensor w_uv_scale, Tensor? out_scale=None, *, Tensor(a!) v_out) "
             "-> ()",
             "v_up_quantized(Tensor o_latent, Tensor w_uv, Tensor w_uv_scale) -> (Tensor v_val, Tensor v_scale)",
             "v_up_quantized.out(Tensor o_latent, Tensor w_uv, Tensor w_uv_scale, *, Tensor(a!) val_out, "
             "Tensor(b!) scale_out) -> ()",
         }) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_library_def(schemas_, schema));
    }
  }

  static void implement(TorchLibraryHandle library) {
    namespace ops = mla_fp8::ops;
    const auto impl = [library](const char* name, void (*boxed)(StableIValue*, uint64_t, uint64_t)) {
      TORCH_ERROR_CODE_CHECK(torch_library_impl(library, name, boxed, TORCH_ABI_VERSION));
    };
    impl("quantize_q_nope", TORCH_BOX(&ops::quantize_q_nope));
    impl("quantize_q_nope.out", TORCH_BOX(&ops::quantize_q_nope_out));
    impl("bmm", TORCH_BOX(&ops::bmm));
    impl("bmm.out", TORCH_BOX(&ops::bmm_out));
    impl("absorb_q", TORCH_BOX(&ops::absorb_q));
    impl("absorb_q.out", TORCH_BOX(&ops::absorb_q_out));
    impl("v_up", TORCH_BOX(&ops::v_up));
    impl("v_up.out", TORCH_BOX(&ops::v_up_out));
    impl("v_up_quantized", TORCH_BOX(&ops::v_up_quantized));
    impl("v_up_quantized.out", TORCH_BOX(&ops::v_up_quantized_out));
  }

  TorchLibraryHandle schemas_ = nullptr, cpu_ = nullptr, cuda_ = nullptr;
};

const Registrar registrar;

}  // namespace
