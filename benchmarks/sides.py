"""The products that the GPU benchmark compares, and the bytes that no implementation of them can avoid.

Activations once, FP8 weights with their scales once, the output once. Every rate in the tables counts these bytes, also
for contenders that move more.
"""

import math
from dataclasses import dataclass

from mla_fp8.config import Device, Problem, problem_for
from mla_fp8.formats import GROUP

ROPE_DIM = 64
L2_MULTIPLE = 3  # of what the buffer sets of one case hold together


@dataclass(frozen=True)
class Side:
    """One product: [S,H,k] x [H,n,k]ᵀ -> [S,H,n + rope]."""

    name: str
    title: str
    op: str  # ours that makes it
    k: int
    n: int
    rope: int = 0
    in_bytes: float = 2  # an activation element; 1 + 4/128 where it comes quantized
    out_bytes: int = 2
    scale_bytes: int = 0  # a (token, head) of the output

    def read_bytes(self, s: int, heads: int) -> int:
        return int(s * heads * (self.k * self.in_bytes + self.rope * 2))

    def weight_bytes(self, heads: int) -> int:
        return heads * (self.n * self.k + 4 * (self.n // GROUP) * (self.k // GROUP))

    def written_bytes(self, s: int, heads: int) -> int:
        return s * heads * ((self.n + self.rope) * self.out_bytes + self.scale_bytes)

    def flops(self, s: int, heads: int) -> int:
        return 2 * s * heads * self.n * self.k

    def bytes(self, s: int, heads: int) -> int:
        return self.read_bytes(s, heads) + self.weight_bytes(heads) + self.written_bytes(s, heads)

    def problem(self, s: int, heads: int) -> Problem:
        """What select_config is asked for it."""
        out_dtype = "float8_e4m3fn" if self.out_bytes == 1 else "bfloat16"
        return problem_for(self.op, s, heads, n=self.n, k=self.k, pe=self.rope, out_dtype=out_dtype)


SIDES = {
    side.name: side
    for side in (
        Side("front512", "q_nope [S,H,128] -> q latent [S,H,512] bf16", "absorb_q", 128, 512),
        Side("front576", "q_nope, q_pe -> q [S,H,576] bf16", "absorb_q", 128, 512, rope=ROPE_DIM),
        Side(
            "front576_fp8",
            "q_nope, q_pe -> q [S,H,576] e4m3, static scale",
            "absorb_q",
            128,
            512,
            rope=ROPE_DIM,
            out_bytes=1,
        ),
        Side("back", "o_latent [S,H,512] -> v [S,H,128] bf16", "v_up", 512, 128),
        Side(
            "back_fp8",
            "o_latent -> v [S,H*128] e4m3, scales [S,H]",
            "v_up_quantized",
            512,
            128,
            out_bytes=1,
            scale_bytes=4,
        ),
        Side(
            "gemm", "q_val, q_scale -> q latent [H,S,512] bf16, product alone", "bmm", 128, 512, in_bytes=1 + 4 / GROUP
        ),
    )
}
SIDE_TITLES = {  # of rows of tables
    "front512": "absorb_q, [S,H,512] bf16",
    "front576": "absorb_q with q_pe, [S,H,576] bf16",
    "front576_fp8": "absorb_q with q_pe, [S,H,576] e4m3",
    "back": "v_up, [S,H,128] bf16",
    "back_fp8": "v_up_quantized, [S,H*128] e4m3",
    "gemm": "bmm, [H,S,512] bf16",
}
GROUPS = {"front": ["front512", "front576", "front576_fp8"], "back": ["back", "back_fp8"], "all": list(SIDES)}


def device_of(gpu: str) -> Device:
    """What a launch on that GPU gives select_config, by the name that torch has for it."""
    return Device(dram_gbps=4425, l2_bytes=60e6) if gpu == "NVIDIA H200" else Device()


def rotation(footprint_bytes: int, l2_bytes: int) -> int:
    """Buffer sets that together exceed L2 L2_MULTIPLE times; a set that does so alone is its own rotation."""
    return max(1, math.ceil(L2_MULTIPLE * l2_bytes / footprint_bytes))
