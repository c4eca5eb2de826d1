// The image of quantize_q_nope: its tiles' kernels.
#define MLA_FP8_KERNEL_kQuantizeQNope MLA_FP8_KERNEL
#include "kernels/sm90/kernels.cuh"
