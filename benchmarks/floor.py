"""The floor: one launch that reads and writes a side's bytes with no mathematics; and the stream ceiling.

The kernel (triton_kernels.move_kernel) is tuned for every shape over tile size, work a program and cache policy; the
fastest is the floor. At large S half of its programs only write, or only read, which DRAM serves 5 to 10% faster than
both at once (docs/notes.md). It reads the side's own buffers, so its weights are as cold as a contender's. Unlike ops
that use programmatic dependent launch it never overlaps with its predecessor, so an op can come out a little below it.

CUDA C++ is no better at this. With 16-byte loads, or with bulk copies through shared memory, each tuned over several
shapes, the best took 4.68 and 4.84 µs where this kernel took 4.37 (S = 1), 8.02 and 8.00 against 8.02 (64), 58.8 and
61.4 against 58.7 (1024). Evict-first reads gain 0.25 µs at S = 1. They gain as much when the buffers rotate through 12
times L2, so it is not by data kept there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timing
import torch
from buffers import Buffers, words
from torch import Tensor

WORDS_A_THREAD = 4  # 16 bytes
WARP = 32
CEILING_BYTES = 1 << 30


@dataclass(frozen=True)
class Shape:
    warps: int
    tiles: int  # a program moves, reads and writes together
    stream: bool = False  # evict first

    def __str__(self) -> str:
        return f"{self.warps} warps, {self.tiles} tiles" + (", evict first" if self.stream else "")


SHAPES = [Shape(8, 4, True), Shape(8, 4), Shape(8, 2), Shape(8, 8), Shape(4, 4), Shape(4, 8)]
QUICK_SHAPES = 2


def shapes(quick: bool) -> list[Shape]:
    return SHAPES[:QUICK_SHAPES] if quick else SHAPES


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def split(word_counts: tuple[int, int, int], shape: Shape) -> tuple[int, tuple[int, int, int]]:
    """Programs, and tiles of w, x and y for each of them: all together cover every word."""
    tile = WORDS_A_THREAD * WARP * shape.warps
    tiles = [ceil_div(count, tile) for count in word_counts]
    programs = max(1, ceil_div(sum(tiles), shape.tiles))
    w, x, y = (ceil_div(count, programs) for count in tiles)
    return max(ceil_div(count, each) for count, each in zip(tiles, (w, x, y), strict=True) if each), (w, x, y)


def move(w: Tensor, x: Tensor, y: Tensor, counts: tuple[int, int, int], shape: Shape) -> None:
    """Reads counts[0] words of w and counts[1] of x, and writes counts[2] words of y."""
    from triton_kernels import move_kernel

    programs, (w_tiles, x_tiles, y_tiles) = split(counts, shape)
    move_kernel[(programs,)](
        *(w, counts[0], x, counts[1], y, counts[2]),
        TILE=WORDS_A_THREAD * WARP * shape.warps,
        W_TILES=w_tiles,
        X_TILES=x_tiles,
        Y_TILES=y_tiles,
        STREAM=shape.stream,
        num_warps=shape.warps,
    )


def floor_call(buffers: Buffers, shape: Shape) -> Callable[[], None]:
    """The call that moves one buffer set's bytes."""
    side, s, heads = buffers.side, buffers.s, buffers.heads
    counts = (side.weight_bytes(heads) // 4, side.read_bytes(s, heads) // 4, side.written_bytes(s, heads) // 4)
    w, x, y = words(buffers.w), words(buffers.x_full), buffers.moved
    counts = (min(counts[0], w.numel()), *counts[1:])  # a few KB of scales have no place behind the weights
    return partial(move, w, x, y, counts, shape)


def stream_ceiling(quick: bool) -> tuple[float, str]:
    """GB/s, read and written, of the fastest large copy: torch's or the floor's kernel."""
    count = CEILING_BYTES // 4
    source = torch.randint(0, 1 << 30, (count,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"torch copy": partial(target.copy_, source)}
    for shape in shapes(quick):
        calls[f"move_kernel, {shape}"] = partial(move, source, source, target, (0, count, count), shape)
    captured = {name: timing.capture([call], 2) for name, call in calls.items()}
    samples = timing.interleave(captured, timing.TUNING_REPLAYS)
    timings = {name: timing.Timing.of(times) for name, times in samples.items()}
    name = min(timings, key=lambda name: timings[name].us)
    return 2 * CEILING_BYTES / timings[name].us / 1e3, name
