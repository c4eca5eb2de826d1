// The image of bmm: its tiles' kernels.
#define MLA_FP8_KERNEL_kBmm MLA_FP8_KERNEL
#include "kernels/sm90/kernels.cuh"
