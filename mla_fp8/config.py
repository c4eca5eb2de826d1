"""Which compiled tile runs a problem, and why: the public names of `mla_fp8.explain` and of the compiled `_config`."""

from mla_fp8._config import Candidate, Config, Device, Op, Problem, Tile, candidates, select_config, tiles
from mla_fp8.explain.device import device_limits
from mla_fp8.explain.explain import explain
from mla_fp8.explain.explanation import Explanation
from mla_fp8.explain.forced_tile import forced_tile
from mla_fp8.explain.problem import problem_for

__all__ = [
    "Candidate",
    "Config",
    "Device",
    "Explanation",
    "Op",
    "Problem",
    "Tile",
    "candidates",
    "device_limits",
    "explain",
    "forced_tile",
    "problem_for",
    "select_config",
    "tiles",
]
