"""Every compiled tile of an op alone, where `check` has a GPU: select_config takes only one for each problem."""

from collections.abc import Iterator

import torch

from mla_fp8.cli.suite import HEADS, M_ALIGNMENT, Maker, Setting, Variant, activations_of
from mla_fp8.config import Device, candidates, device_limits, forced_tile, problem_for

ROWS = (1, 33, 257)


def each_tile(variant: Variant, seed: int, device: str) -> Iterator[tuple[str, list[str]]]:
    """What differs, by tile and number of tokens, for every tile that takes the problem."""
    limits = Device() if device == "cpu" else device_limits(torch.device(device).index or 0)
    for s in ROWS:
        maker = Maker(Setting(s, torch.bfloat16, "normal", strided=False), seed, device)
        arguments = variant.make(maker)
        pe = arguments["q_pe"].shape[-1] if "q_pe" in arguments else 0
        out_dtype = "float8_e4m3fn" if "out_scale" in arguments else None
        problem = problem_for(
            variant.op,
            s,
            HEADS,
            pe=pe,
            m_alignment=M_ALIGNMENT,
            activations=activations_of(arguments),
            out_dtype=out_dtype,
        )
        for candidate in candidates(problem, limits):
            if not candidate.kept:
                continue
            symbol = candidate.config.tile.symbol
            try:
                with forced_tile(symbol):
                    wrong = variant.compare(arguments, variant.call(arguments), maker.typical)
            except RuntimeError as error:
                wrong = f"raised {error}"
            yield f"tile {symbol}, S = {s}", [wrong] if wrong else []
