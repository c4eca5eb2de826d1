"""What `enable` did or refused, in a few lines however many layers a model has."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

REASONS = 4  # that a text gives; the rest is counted


@dataclass(frozen=True)
class Summary:
    """What `enable` did. `print` shows it in a few lines, layers and reasons grouped.

    enabled: names of the layers that decode absorbed.
    skipped: name -> reason of every other attention layer; these run torch's SDPA.
    memory_bytes: bytes of the FP8 weights and scales that came beside kv_b_proj; 0 with weights="unquantized".
    notes: name -> what was done beyond reading a weight, such as merging an adapter.
    """

    enabled: tuple[str, ...]
    skipped: dict[str, str]
    memory_bytes: int
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Three lines for a model of one kind of layer."""
        lines = [f"enabled {_count(self.enabled)}: {ranges(self.enabled)}"]
        lines += [f"  note: {said}" for said in by_reason(self.notes)]
        lines += [f"skipped {_count(self.skipped)} (torch's SDPA)"] if self.skipped else []
        lines += [f"  {said}" for said in by_reason(self.skipped)]
        return "\n".join([*lines, f"{self.memory_bytes / 1e6:,.1f} MB of FP8 weights"])


def _count(names: Iterable[str]) -> str:
    number = len(list(names))
    return f"{number} layer{'' if number == 1 else 's'}"


def ranges(names: Iterable[str]) -> str:
    """["a.0.b", "a.1.b", "a.3.b"] -> "a.{0-1,3}.b"."""
    numbers: dict[tuple[str, str], list[int]] = defaultdict(list)
    alone = []
    for name in names:
        found = re.fullmatch(r"(.*?)\b(\d+)\b(.*)", name)
        if found:
            numbers[found[1], found[3]].append(int(found[2]))
        else:
            alone.append(name or "the module itself")
    grouped = []
    for (before, after), found_numbers in numbers.items():
        runs = _runs(sorted(found_numbers))
        grouped.append(f"{before}{{{runs}}}{after}" if len(found_numbers) > 1 else f"{before}{runs}{after}")
    return ", ".join([*grouped, *alone])


def _runs(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i + 1 == len(numbers) or numbers[i + 1] != n + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """name -> reason, as "names: reason", a line a reason, the most frequent first."""
    names = defaultdict(list)
    for name, reason in reasons.items():
        names[reason].append(name)
    most_first = sorted(names.items(), key=lambda item: -len(item[1]))
    said = [f"{ranges(where)}: {reason}" for reason, where in most_first[:REASONS]]
    return said + ([f"and {len(names) - REASONS} more reasons"] if len(names) > REASONS else [])


def kind_of(model: Any, layers: Iterable[Any] = ()) -> str:
    """The model's class and, where its config has one, its type: "LlamaForCausalLM (llama)"."""
    while type(model).__name__ in ("OptimizedModule", "DistributedDataParallel"):
        model = getattr(model, "_orig_mod", None) or model.module
    configs: list[Any] = [getattr(part, "config", None) for part in (*layers, model)]
    types = [config.model_type for config in configs if isinstance(getattr(config, "model_type", None), str)]
    return f"{type(model).__name__} ({types[0]})" if types else type(model).__name__


def refusal(model: Any, layers: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """One sentence on a model of which no layer can be enabled."""
    if not reasons:
        return f"{kind_of(model)}, without an attention layer"
    return f"{kind_of(model, layers.values())}: {'; '.join(by_reason(reasons))}"
