"""What became of the calls that were given a `BlockFp8Weight`: a product from FP8, or a copy in 16 bits."""

import itertools
import logging
import threading
from typing import NamedTuple

_log = logging.getLogger("mla_fp8")
_lock = threading.Lock()
_said: set[str] = set()  # what `warn_of_read` has named


class Counts(NamedTuple):
    """How often a `BlockFp8Weight` was used each way."""

    products: int  # that ran from FP8
    dequantizations: int  # reads of a weight as 16-bit numbers, asked for or not


class _Counter:
    """Steps of a C iterator: threads lose none, and one costs some 30 ns. A look is a step too, and is taken off."""

    def __init__(self) -> None:
        self.step = itertools.count().__next__
        self._looks = self._start = 0

    def value(self) -> int:
        with _lock:
            steps = self.step() - self._looks
            self._looks += 1
            return steps - self._start

    def reset(self) -> None:
        self._start += self.value()


_products, _dequantizations = _Counter(), _Counter()
count_product, count_dequantization = _products.step, _dequantizations.step


def counts() -> Counts:
    """Say how many products ran from FP8 and how many reads dequantized, since the start or `reset_counts()`.

    Returns:
        `.products` and `.dequantizations`, of all weights and threads of this process.

    Raises: nothing.

    Notes: calls are counted as the host makes them. A CUDA graph counts when it is captured, and compiled code when it
    is traced, at least once, not when they run.

    Example:
        >>> weight = BlockFp8Weight(torch.zeros(2, 512, 128).to(torch.float8_e4m3fn), torch.ones(2, 4, 1))
        >>> reset_counts()
        >>> _ = torch.bmm(torch.zeros(2, 3, 128, dtype=torch.bfloat16), weight)
        >>> counts()
        Counts(products=1, dequantizations=0)
    """
    return Counts(_products.value(), _dequantizations.value())


def reset_counts() -> None:
    """Make `counts()` begin at 0 again; what has been warned of is not said again.

    Returns: nothing.
    Raises: nothing.

    Example:
        >>> reset_counts()
        >>> counts()
        Counts(products=0, dequantizations=0)
    """
    _products.reset()
    _dequantizations.reset()


def warn_of_read(function: str, shape: list[int], reason: str | None) -> None:
    """Log, once a process and function, that `function` makes a 16-bit copy of a whole weight."""
    if function not in _said:
        _said.add(function)
        text = "BlockFp8Weight: %s dequantizes the whole weight %s%s: said once a function, counted by counts()"
        _log.warning(text, function, shape, f", for {reason}" if reason else "")
