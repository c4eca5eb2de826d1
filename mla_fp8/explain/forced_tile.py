"""One compiled tile instead of the chosen one, for a thread: to compare tiles."""

import contextlib
from collections.abc import Iterator

from mla_fp8 import _native
from mla_fp8._config import tiles


@contextlib.contextmanager
def forced_tile(symbol: str) -> Iterator[None]:
    """Make this thread's CUDA calls of the tile's op use that tile, to compare it with others.

    Args:
        symbol: of a line of csrc/kernels/<architecture>/tiles.h, as `tiles()` lists them,
            e.g. "absorb_q_shared512".

    Returns:
        a context manager; at its end the thread chooses tiles again.

    Raises:
        ValueError: no such tile is compiled.
        RuntimeError: later, from a call that the tile cannot run, with the reason.

    Notes: the bits of a result do not depend on the tile. CPU calls have no tiles.

    Example:
        >>> with forced_tile("absorb_q_shared512"):
        ...     pass
    """
    if not _native.force_tile(symbol):
        raise ValueError(f"forced_tile: symbol must be one of {', '.join(t.symbol for t in tiles())}, got {symbol!r}")
    try:
        yield
    finally:
        _native.force_tile(None)
