"""A file for each command of `python -m mla_fp8`: `add` gives it its arguments, `run` returns the exit status."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

EXIT_OK = 0
EXIT_FAILED = 1  # it ran, and the answer is no
EXIT_USAGE = 2  # it did not run: what was asked for cannot be, as argparse says it too


def integer_of(low: int, high: int) -> Callable[[str], int]:
    """For argparse: a number with both its bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be an integer in [{low}, {high}], got {text!r}")
        return value

    return parse


def positive_ranges(text: str) -> list[int]:
    """integer_ranges without 0."""
    numbers = integer_ranges(text)
    if 0 in numbers:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text!r}")
    return numbers


def integer_ranges(text: str) -> list[int]:
    """Numbers between commas, each alone or a range with both its ends: "0,3-5" is [0, 3, 4, 5]."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ok = first.isdecimal() and (not dash or last.isdecimal()) and int(first) <= int(last or first)
        if not ok:
            raise argparse.ArgumentTypeError(f"must be numbers and ranges like 0,3-5, got {text!r}")
        numbers += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(numbers))


def ranges_text(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def in_shell_words(error: Exception, command: str, options: Mapping[str, str]) -> str:
    """What a function of the package says, to a user of the shell: `options` has its arguments' names there."""
    text = re.sub(r"^\w+: ", f"{command}: ", str(error))
    for argument, option in options.items():
        text = re.sub(rf"(?<![\w.'-]){argument} (must|=) ", rf"{option} \1 ", text)
    return text.replace("quantize_bf16=True", "--quantize-bf16")
