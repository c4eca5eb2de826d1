// Which instruction set this machine gets: the best that it has and that the build's MLA_FP8_CPU
// allows.
#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace mla_fp8::cpu {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (MLA_FP8_USE_AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return *avx512_kernels();
  }
  if (MLA_FP8_USE_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return *avx2_kernels();
  }
#endif
  return portable_kernels();
}

}  // namespace

const Kernels& best_kernels() {
  static const Kernels& kernels = choose();
  return kernels;
}

}  // namespace mla_fp8::cpu

const char* mla_fp8_cpu_instruction_set() { return mla_fp8::cpu::best_kernels().name; }
