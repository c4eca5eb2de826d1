"""Prints the directory of the torch that a build compiles against; finds it by path and never imports it.

pip builds in an isolated environment that hides the one it installs into. Its interpreter is the target's own, though:
started without PYTHONPATH (`-E`) it sees the target's packages again. Tools that isolate with a second virtual
environment (build, uv) leave VIRTUAL_ENV or PATH as a trace of the first one; MLA_FP8_TORCH_DIR overrides all of this.
Any torch that is new enough will do: the library is compiled for the stable ABI of the oldest in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_PRINT_TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(*s.submodule_search_locations if s else ())"


def requirement() -> str:
    """Returns pyproject.toml's torch requirement, as in "torch>=2.10"."""
    match = re.search(r'"(torch>=\d+\.\d+)"', PYPROJECT.read_text())
    if match is None:
        raise RuntimeError(f'build: {PYPROJECT} must hold a dependency "torch>=MAJOR.MINOR", got none')
    return match[1]


def _interpreters() -> Iterator[str]:
    yield sys.executable
    yield os.path.join(os.environ.get("VIRTUAL_ENV", ""), "bin", "python")
    for directory in os.get_exec_path():
        yield os.path.join(directory, "python3")


def _candidates() -> Iterator[Path]:
    if "MLA_FP8_TORCH_DIR" in os.environ:
        yield Path(os.environ["MLA_FP8_TORCH_DIR"])
    spec = importlib.util.find_spec("torch")
    if spec is not None:
        yield from map(Path, spec.submodule_search_locations or [])
    for interpreter in dict.fromkeys(filter(os.path.isfile, _interpreters())):
        command = [interpreter, "-E", "-c", _PRINT_TORCH]
        directory = subprocess.run(command, cwd="/", capture_output=True, text=True).stdout.strip()
        if directory:
            yield Path(directory)


def _release(directory: Path) -> tuple[int, int] | None:
    file = directory / "version.py"
    match = re.search(r"__version__ = ['\"](\d+)\.(\d+)", file.read_text()) if file.is_file() else None
    return (int(match[1]), int(match[2])) if match else None


def find_torch() -> Path | None:
    """Returns the directory of the first torch that is new enough and has its C++ headers, or None."""
    major, minor = requirement().removeprefix("torch>=").split(".")
    for directory in _candidates():
        release = _release(directory)
        has_headers = (directory / "include/torch/csrc/stable/library.h").is_file()
        if release is not None and release >= (int(major), int(minor)) and has_headers:
            return directory
    return None


if __name__ == "__main__":
    found = find_torch()
    if found is None:
        seen = ", ".join(map(str, _candidates())) or "none"
        sys.exit(
            f"build: torch must be {requirement()} with its headers, got {seen}; set MLA_FP8_TORCH_DIR to its path"
        )
    print(found)
