"""Token sequences that every run gives to its model: the same for stock, plugin and oracle."""

import random
from typing import NamedTuple

FIRST_TOKEN = 2  # 0 and 1 begin and end a text


class Text(NamedTuple):
    prompt: list[int]
    continuation: list[int]  # what a forced run writes, whatever the model would


class Size(NamedTuple):
    """How many texts, and how long. A prompt has half of prompt_tokens to all of them."""

    sequences: int = 64
    prompt_tokens: int = 120
    forced_tokens: int = 65

    @property
    def positions(self) -> int:
        """Those of decode steps: the first forced token of a text comes from its prefill."""
        return self.sequences * (self.forced_tokens - 1)


def texts(size: Size, vocab_size: int, seed: int = 1) -> list[Text]:
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(FIRST_TOKEN, vocab_size) for _ in range(count)]

    lengths = [draw.randint(size.prompt_tokens // 2, size.prompt_tokens) for _ in range(size.sequences)]
    return [Text(tokens(length), tokens(size.forced_tokens)) for length in lengths]


def prompt_of(length: int, index: int, vocab_size: int) -> list[int]:
    """A prompt of a timed run, where only its length matters."""
    return [(7 * index + 13 * place) % (vocab_size - FIRST_TOKEN) + FIRST_TOKEN for place in range(length)]
