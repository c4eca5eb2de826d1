"""select_config under any numbers at all: a Config, or a ValueError with every value, never another error."""

import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mla_fp8._config import Config, Device, Op, Problem, candidates, select_config

INT64, INT32 = 2**63, 2**31
EDGES_64 = [-INT64, -INT64 + 1, -INT32 - 1, -1, 0, 1, 127, 128, 16384, INT32 - 1, INT32, 2**32, 2**48, INT64 - 1]
EDGES_32 = [-INT32, -INT32 + 1, -1, 0, 1, 2, 16, 17, 1 << 24, INT32 - 1]
WIDE = st.sampled_from(EDGES_64) | st.integers(-INT64, INT64 - 1) | st.integers(0, 300)
NARROW = st.sampled_from(EDGES_32) | st.integers(-INT32, INT32 - 1)
SPEED = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([5e-324, 1e-308, 1.7e308, 1.0])
WIDE_FIELDS = ("s", "heads", "n", "k", "pe", "m")
NARROW_FIELDS = ("in_bytes", "terms", "out_bytes", "align_bytes")
SPEEDS = ("dram_gbps", "l2_gbps", "l2_bytes", "mma_tflops", "launch_us")
LIMITS = tuple(name for name in Device._fields if name not in SPEEDS)


def some(fields, values):
    """Any values for any of the fields; the others keep their defaults."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(fields, values))


def answer(asked, device):
    """What select_config returns, or None where it refuses; the one thing that it may raise names every field."""
    try:
        config = select_config(asked, device)
    except ValueError as error:
        message = str(error)
        op, kernel = re.escape(asked.op.name), re.escape(f"no kernel for s={asked.s}, heads={asked.heads}, ")
        broken = re.match(f"{op}: [^(]+ must .+ \\({kernel}.+\\)$", message)
        assert broken or re.match(f"{op}: {kernel}.+: .+ (is for|needs|takes) ", message), message
        if broken:  # else each candidate has its reason
            with pytest.raises(ValueError, match=re.escape(message)):
                candidates(asked, device)
        return None
    assert isinstance(config, Config)
    return config


def assert_sane(config, asked):
    assert 0 <= config.grid_x < INT32 and 0 <= config.tiles < INT64 and config.waves >= 0
    assert config.modelled_us >= 0 and config.modelled_bytes >= 0, "an infinite time is one, NaN is none"
    assert (config.grid_x == 0) == (config.tiles == 0)
    columns = asked.k if asked.op == Op.quantize_q_nope else asked.n
    rows = max(asked.m, asked.s)
    assert config.tiles == math.ceil(rows / config.tile.m) * (columns // config.tile.n) * asked.heads


@settings.get_profile("fuzz")
@given(
    op=st.sampled_from([Op.quantize_q_nope, Op.bmm, Op.absorb_q, Op.v_up]),
    wide=some(WIDE_FIELDS, WIDE),
    narrow=some(NARROW_FIELDS, NARROW),
)
@example(op=Op.absorb_q, wide={"pe": -INT64}, narrow={"in_bytes": -INT32, "out_bytes": INT32 - 1})
@example(op=Op.absorb_q, wide={"pe": INT64 - 1}, narrow={"align_bytes": -1})
def test_select_config_answers_or_refuses_any_problem(op, wide, narrow):
    asked = Problem(op=op, **wide, **narrow)
    config = answer(asked, Device())
    if config is not None:
        assert_sane(config, asked)


@settings.get_profile("fuzz")
@given(
    op=st.sampled_from([Op.quantize_q_nope, Op.bmm, Op.absorb_q, Op.v_up]),
    s=st.sampled_from([0, 1, 64, 4096, INT32 - 1]),
    limits=some(LIMITS, NARROW),
    speeds=some(SPEEDS, SPEED),
)
@example(op=Op.absorb_q, s=1, limits={}, speeds={"l2_gbps": 4e5, "dram_gbps": 1e9, "launch_us": 0.0})
def test_select_config_answers_or_refuses_any_device(op, s, limits, speeds):
    asked = Problem(
        op=op, s=s, heads=16, in_bytes=1 if op == Op.bmm else 2, out_bytes=1 if op == Op.quantize_q_nope else 2
    )
    config = answer(asked, Device(**limits, **speeds))
    if config is not None:
        assert_sane(config, asked)
