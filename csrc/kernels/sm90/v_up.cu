// The image of v_up: its tiles' kernels.
#define MLA_FP8_KERNEL_kVUp MLA_FP8_KERNEL
#include "kernels/sm90/kernels.cuh"
