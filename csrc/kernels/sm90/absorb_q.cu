// The image of absorb_q: its tiles' kernels.
#define MLA_FP8_KERNEL_kAbsorbQ MLA_FP8_KERNEL
#include "kernels/sm90/kernels.cuh"
