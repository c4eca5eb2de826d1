// Which instruction set this machine gets: the best that it has and that the build's MLA_FP8_CPU
// allows.
#include "cpu/gemm.h"
#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mla_fp8::cpu {
namespace {

// Whether the CPU multiplies tiles of bf16 and Linux lets this process have them, from 5.16 on.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kLeaf = 7, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // bits of edx
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(kLeaf, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (MLA_FP8_USE_AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (MLA_FP8_USE_AMX && __builtin_cpu_supports("avx512vbmi") && has_amx()) return *amx_kernels();
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
