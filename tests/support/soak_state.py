"""What a soak carries from run to run: which plan on which machine and library, and what its first pass gave."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import mla_fp8
from mla_fp8 import _native, jit
from mla_fp8.cli import facts


@dataclass
class State:
    """A plan, what its first pass gave, and how long it has run; the JSON file."""

    seed: int
    count: int  # of cases
    device: str
    library: str
    torch: str
    digests: list[list[str]] = field(default_factory=list)  # of each case's results in the first pass
    runs: int = 0
    minutes: float = 0.0
    passes: int = 0
    cases: int = 0
    launches: int = 0

    @classmethod
    def read(cls, path: Path) -> "State":
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"soak: --state must be a file that a soak wrote, got {path}: {error}") from None

    def must_fit(self, here: "State", path: Path) -> None:
        for name in ("seed", "count", "device", "library", "torch"):
            there, wanted = getattr(self, name), getattr(here, name)
            if there != wanted:
                rule = f"must have {'cases' if name == 'count' else name} {wanted!r} as this run"
                raise ValueError(f"soak: --state {rule}, got {there!r} in {path}: take another file")

    def write(self, path: Path) -> None:
        new = path.with_name(f"{path.name}.new")
        new.write_text(json.dumps(asdict(self)) + "\n")
        os.replace(new, path)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{facts.cpu_facts()['name']}, {_native.cpu_instruction_set()} kernels"


def library_name() -> str:
    """The version, and a digest of the sources that are installed: a rebuilt library is the same one."""
    digest, root = hashlib.sha256(), jit.source_directory()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return f"{mla_fp8.__version__} {digest.hexdigest()[:12]}"
