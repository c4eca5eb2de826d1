"""`check`: every op and overload against `mla_fp8.reference` on the devices of this machine, in seconds."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from mla_fp8.cli import EXIT_FAILED, EXIT_OK, EXIT_USAGE, Commands, in_shell_words, integer_of
from mla_fp8.cli.terminal import Terminal
from mla_fp8.text import wrap

SHOWN = 3  # differences an op and device
DEFAULT_SEED = 0
SEEDS = integer_of(0, 2**63 - 1)


@dataclass
class Result:
    """One op on one device; a line of the output and an object of --json."""

    op: str
    device: str
    cases: int = 0
    seconds: float = 0.0
    skipped: str = ""  # why
    differences: list[str] = field(default_factory=list)


def add(commands: Commands) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "check",
        help="compare every op with the reference on the devices here, in seconds",
        description="Compare every op, and its overload that writes into given views, with mla_fp8.reference: odd "
        "numbers of tokens, strided views, outliers, rows with NaN and Inf, bf16 and fp16, exact and FP8 activations; "
        "on a GPU also each compiled tile alone. Exits with 1 if anything differs, and shows the worst element.",
    )
    command.add_argument("--device", action="append", help="cpu, cuda:0, ...; may be given again; default: all here")
    command.add_argument("--seed", type=SEEDS, default=DEFAULT_SEED, help="of the inputs; default %(default)s")
    command.add_argument("--json", action="store_true", help="print the values as JSON")
    command.add_argument(
        "--weights",
        metavar="DIR",
        help="instead: on a layer of this checkpoint, the errors of exact and FP8 activations and of torch.bmm in bf16",
    )
    command.add_argument("--layer", type=integer_of(0, 2**31), default=0, help="of --weights; default %(default)s")
    command.add_argument("--name", help="of --weights: of the tensors, before .weight, with {layer} in it")
    command.add_argument("--quantize-bf16", action="store_true", help="take --weights without FP8, quantized first")
    return command


def run(given: argparse.Namespace) -> int:
    import torch

    devices = given.device or ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if wrong := [device for device in devices if not _is_device(device)]:
        print(f"error: check: --device must be cpu, cuda or cuda:0, cuda:1, ..., got {wrong[0]}", file=sys.stderr)
        return EXIT_USAGE
    if given.weights is not None:
        return run_weights(given, devices)
    terminal = Terminal()
    results = []
    with contextlib.nullcontext() if given.json else terminal.working("comparing with the reference"):
        for result in check(devices, given.seed):
            results.append(result)
            if not given.json:
                show(result, terminal)
    failed = [result for result in results if result.differences]
    ran = [result for result in results if not result.skipped]
    if given.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    elif failed:
        names = ", ".join(f"{result.op} on {result.device}" for result in failed)
        terminal.print_lines(["", *wrap(f"FAIL: {names}", terminal.width)], "bold red")
    elif ran:
        cases, seconds = sum(result.cases for result in ran), sum(result.seconds for result in ran)
        terminal.print(f"\nPASS: {cases:,} cases in {seconds:.1f} s", "bold green")
    else:
        terminal.print("\nnothing was checked: no device here runs the ops", "bold red")
    return EXIT_FAILED if failed or not ran else EXIT_OK


def run_weights(given: argparse.Namespace, devices: list[str]) -> int:
    import torch

    from mla_fp8.cli.losses import losses, show
    from mla_fp8.weights import AbsorbedWeights
    from mla_fp8.weights.checkpoint import KV_B_PROJ

    try:
        weights = AbsorbedWeights.from_safetensors(
            given.weights, given.layer, quantize_bf16=given.quantize_bf16, name=given.name or KV_B_PROJ
        )
    except (ValueError, OSError) as error:
        words = {"directory": "--weights", "layer": "--layer", "name": "--name"}
        print(f"error: {in_shell_words(error, 'check', words)}", file=sys.stderr)
        return EXIT_USAGE
    terminal, skipped = Terminal(), {device: _why_not(device) for device in devices}
    with torch.no_grad(), contextlib.nullcontext() if given.json else terminal.working("measuring errors"):
        found = [loss for device in devices if not skipped[device] for loss in losses(weights, device, given.seed)]
    if given.json:
        print(json.dumps([asdict(loss) for loss in found], indent=2))
    else:
        for device, reason in skipped.items():
            if reason:
                terminal.print_lines(wrap(f"{device} skipped: {reason}", terminal.width), "yellow")
        show(found, terminal)
    return EXIT_OK if found and all(loss.passed for loss in found) else EXIT_FAILED


def check(devices: list[str], seed: int = DEFAULT_SEED) -> Iterator[Result]:
    import torch

    from mla_fp8.cli.suite import VARIANTS

    for device in devices:
        skipped = _why_not(device)
        for op in dict.fromkeys(variant.op for variant in VARIANTS):
            result = Result(op, device, skipped=skipped)
            begin = time.perf_counter()
            if not skipped:
                with torch.no_grad():
                    _check_op(result, seed)
            result.seconds = round(time.perf_counter() - begin, 3)
            yield result


def _check_op(result: Result, seed: int) -> None:
    from mla_fp8.cli.suite import SETTINGS, VARIANTS, Maker
    from mla_fp8.cli.tiles import each_tile

    for variant in (variant for variant in VARIANTS if variant.op == result.op):
        for setting in SETTINGS:
            result.cases += 1
            title = f"{variant.name}{': ' if variant.name else ''}{setting}"
            try:
                found = list(variant.differences(Maker(setting, seed, result.device)))
            except RuntimeError as error:
                found = [f"raised {type(error).__name__}: {error}"]
            result.differences += [f"{title}: {difference}" for difference in found]
        if result.device != "cpu":
            for title, found in each_tile(variant, seed, result.device):
                result.cases += 1
                result.differences += [f"{title}: {difference}" for difference in found]


def _is_device(device: str) -> bool:
    import torch

    try:
        return torch.device(device).type in ("cpu", "cuda")
    except RuntimeError:
        return False


def _why_not(device: str) -> str:
    """Empty where the ops run on it."""
    import torch

    from mla_fp8 import devices
    from mla_fp8.cli.facts import no_cuda

    kind, index = torch.device(device).type, torch.device(device).index or 0
    if kind == "cpu":
        return ""
    if index >= torch.cuda.device_count():
        return no_cuda() if not torch.cuda.device_count() else f"there are {torch.cuda.device_count()} CUDA devices"
    return devices.why_not_on(index) or ""


def show(result: Result, terminal: Terminal) -> None:
    """One line, and the first differences below it."""
    head = f"{result.op:<16} {result.device:<7}"
    if result.skipped:
        terminal.print_lines(wrap(f"{head} skipped: {result.skipped}", terminal.width), "yellow")
        return
    verdict, style = ("FAIL", "bold red") if result.differences else ("PASS", "green")
    terminal.print(f"{head} {result.cases:>4} cases {result.seconds:>6.1f} s  {verdict}", style)
    for difference in result.differences[:SHOWN]:
        terminal.print_lines(wrap(difference, terminal.width, indent="  "), "red")
    if len(result.differences) > SHOWN:
        terminal.print(f"  and {len(result.differences) - SHOWN} more")
