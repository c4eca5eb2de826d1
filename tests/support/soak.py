"""Repeat a plan of calls: the first pass's bits every time, and flat memory.

    make soak ARGS="--minutes 8 --state soak.json"  # again: the plan goes on
    python tests/support/soak.py --minutes 0.5 --device cpu --cases 20

The plan mixes ops, tokens, heads, dtypes, strides, views to write into,
streams, captured graphs and threads; between calls weights change in place and
change back. The state file holds what the first pass gave: runs that follow one
another compare with it. Status 1: something differs, fails or grows; 2: nothing
ran, as the state is of another plan, machine or library.
"""

import argparse
import ctypes
import functools
import gc
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import soak_cases
import torch
from helpers import bits
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from soak_cases import Call, Material
from soak_state import State, device_name, library_name
from torch import Tensor

from mla_fp8 import jit
from mla_fp8.cli import facts

DEFAULT_CASES = {"cpu": 100, "cuda": 400}
GROUP = 8  # cases whose results are kept until the device has made them all
REPORT_EVERY_S = 60  # where there is no terminal for a progress bar
WARM_UP_PASSES = 2  # of each run; then memory is measured
PASSES_A_RUN = WARM_UP_PASSES + 1  # at least
MIB = 2**20
# How much more there may be at the end of a run than after its warm-up.
GROWTH_BYTES = {
    "RSS": 32 * MIB,  # it goes up and down by some MiB, as an allocator keeps what was freed in pieces
    "torch on the GPU": MIB // 16,  # every tensor of a pass is gone after it
    "the GPU": 64 * MIB,  # the driver's memory for modules and graphs comes in large pieces
}


class Found(Exception):
    """What a soak is for."""


def driver_bytes() -> int:
    """What the driver holds for this process; where it does not tell processes apart, for all of them."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    listed = subprocess.check_output(query, text=True).splitlines() if shutil.which(query[0]) else []
    own = [mib.strip() for pid, mib in (line.split(",") for line in listed) if int(pid) == os.getpid()]
    if own and all(mib.isdigit() for mib in own):
        return sum(int(mib) * MIB for mib in own)
    free, total = torch.cuda.mem_get_info()
    return total - free


def memory_bytes(device: str) -> dict[str, int]:
    """What is in use, once what is only kept for later is given back."""
    gc.collect()
    used = {}
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        allocated = torch.cuda.memory_stats()["allocated_bytes.all.current"]
        used = {"torch on the GPU": allocated, "the GPU": driver_bytes()}
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"RSS": pages * os.sysconf("SC_PAGE_SIZE"), **used}


def difference(case: soak_cases.Case, material: Material, label: tuple, got: Tensor, recorded: str) -> str:
    """Where a result first differs from the same call, made again by itself as the first pass gave it."""
    step, _, name = label
    call = Call(case, material)
    call.fill(step)
    want = dict(zip(call.one.outs, call.run(), strict=True))[name]
    again = hexadecimal(material.digest(want).item())
    if again != recorded:
        return f"and made again by itself it has digest {again}, not {recorded} of the first pass"
    both = [(tensor.cpu(), bits(tensor.contiguous()).cpu()) for tensor in (got, want)]
    wrong = (both[0][1] != both[1][1]) & ~(both[0][0].float().isnan() & both[1][0].float().isnan())
    index = tuple(wrong.nonzero()[0].tolist())
    shown = [f"{t[index].float().item():.9g} ({b[index].item() % 256 ** b.element_size():#x})" for t, b in both]
    return f"{int(wrong.sum()):,} of {wrong.numel():,} elements, first {list(index)}: got {shown[0]}, want {shown[1]}"


def hexadecimal(digest: int) -> str:
    return f"{digest % 2**64:016x}"


def run_group(cases: list[soak_cases.Case], material: Material, state: State) -> None:
    """Make them all, then compare; in the first pass, record."""
    kept, made = [], []  # calls, whose tensors the GPU may still need; (case, label, result, digest)
    case = cases[0]
    try:
        for case in cases:
            kept.append(call := Call(case, material))
            for step, results in enumerate(call.results()):
                material.launches += len(results)
                for which, result in enumerate(results):
                    for name, tensor in zip(call.one.outs, result, strict=True):
                        made.append((case, (step, which, name), tensor, material.digest(tensor)))
        digests = torch.stack([digest for *_, digest in made]).tolist()
    except RuntimeError as error:
        where = f"{case}" if len(kept) < len(cases) else f"cases {cases[0].number} to {case.number}"
        raise Found(f"{where}: raised {type(error).__name__}: {error}") from error
    given: dict[int, list[str]] = {case.number: [] for case in cases}
    for (case, label, tensor, _), digest in zip(made, map(hexadecimal, digests), strict=True):
        given[case.number].append(digest)
        if case.number < len(state.digests):
            recorded = state.digests[case.number][len(given[case.number]) - 1]
            if digest != recorded:
                where = f"step {label[0]}, call {label[1]}, {label[2]}"
                raise Found(f"{case}, {where}: {difference(case, material, label, tensor, recorded)}")
    state.digests += list(given.values())[max(0, len(state.digests) - cases[0].number) :]
    state.cases += len(cases)


class Watch:
    """The progress line, or without a terminal a line a minute."""

    def __init__(self, console: Console, minutes: float):
        columns = (TextColumn("{task.description:<28}"), BarColumn(24), TextColumn("{task.fields[time]}"))
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=minutes * 60, time="")
        self.console, self.minutes, self.begin = console, minutes, time.monotonic()
        self.said = self.begin

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.begin

    def show(self, text: str) -> None:
        spent = f"{self.elapsed_s / 60:.1f} of {self.minutes:g} min"
        self.bar.update(self.task, completed=self.elapsed_s, description=text, time=spent)
        if self.bar.disable and time.monotonic() - self.said >= REPORT_EVERY_S:
            self.said = time.monotonic()
            self.console.print(f"{text}, {spent}")


def soak(state: State, device: str, minutes: float, console: Console, save=lambda: None) -> dict[str, tuple[int, int]]:
    """Passes until the time is over -> memory after this run's warm-up and at its end. Raises Found."""
    cases, material = soak_cases.plan(state.seed, state.count, device), Material(state.seed, device)
    before, launches, minutes_before, number = {}, state.launches, state.minutes, 0
    watch = Watch(console, minutes)
    state.runs += 1
    with watch.bar:
        while number < PASSES_A_RUN or watch.elapsed_s < minutes * 60:
            for begin in range(0, len(cases), GROUP):
                if number >= PASSES_A_RUN and watch.elapsed_s >= minutes * 60:
                    break
                watch.show(f"pass {number + 1}, case {begin} of {len(cases)}")
                run_group(cases[begin : begin + GROUP], material, state)
                state.launches, state.minutes = launches + material.launches, minutes_before + watch.elapsed_s / 60
            else:
                if device == "cuda":
                    torch.cuda.synchronize()  # raises what any stream met
                state.passes += 1
                save()
            number += 1
            if number == WARM_UP_PASSES:
                before = memory_bytes(device)
    after = memory_bytes(device)
    save()
    return {name: (before[name], after[name]) for name in before}


def summary(state: State, memory: dict[str, tuple[int, int]]) -> str:
    plan = f"plan of {state.count} cases from seed {state.seed}"
    lines = [f"soak of mla_fp8 {state.library}, torch {state.torch}", f"on {state.device}"[:80]]
    lines += [
        f"{plan}: {state.minutes:.1f} minutes in {state.runs} run{'s'[: state.runs > 1]}, {state.passes:,} passes,"
    ]
    lines += [f"{state.cases:,} cases, {state.launches:,} launches"]
    if memory:
        lines += ["", f"{'memory in use, MiB':<24}{'warmed up':>12}{'end':>12}{'growth':>12}{'allowed':>12}"]
    for name, (before, after) in memory.items():
        values = (before, after, after - before, GROWTH_BYTES[name])
        lines += [f"{name:<24}" + "".join(f"{value / MIB:>12,.1f}" for value in values)]
    return "\n".join(lines)


def must_be_flat(memory: dict[str, tuple[int, int]]) -> None:
    for name, (before, after) in memory.items():
        if after - before > GROWTH_BYTES[name]:
            grown, allowed = (after - before) / MIB, GROWTH_BYTES[name] / MIB
            raise Found(f"memory of {name} grew by {grown:,.1f} MiB after the warm-up, at most {allowed:,.1f} allowed")


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--minutes", type=float, default=8.0, help="of this run; default %(default)s")
    command.add_argument("--state", type=Path, metavar="FILE", help="carries plan and digests from run to run")
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    command.add_argument("--seed", type=int, help="of the plan; default: the state's, or 0")
    command.add_argument("--cases", type=int, help="of the plan; default: the state's, or 100 on a CPU, 400 on a GPU")
    return command


def state_of(given: argparse.Namespace, device: str) -> State:
    """The file's, which must fit, or a new one. Raises ValueError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"soak: --device must be cpu, got cuda: {facts.no_cuda()}")
    if device == "cuda":
        jit.warm_up(torch.cuda.current_device())
    known = State.read(given.state) if given.state and given.state.exists() else None
    seed = (known.seed if known else 0) if given.seed is None else given.seed
    count = (known.count if known else DEFAULT_CASES[device]) if given.cases is None else given.cases
    if count < 1:
        raise ValueError(f"soak: --cases must be at least 1, got {count}")
    here = State(seed, count, device_name(device), library_name(), str(torch.__version__))
    if known is None:
        return here
    known.must_fit(here, given.state)
    return known


def main(arguments: list[str] | None = None) -> int:
    given, console = parser().parse_args(arguments), Console(highlight=False, soft_wrap=True)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        state = state_of(given, device)
        save = functools.partial(state.write, given.state) if given.state else lambda: None
        save()
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: the kernels do not run on this GPU
        print(f"error: {error}", file=sys.stderr)
        return 2
    memory: dict[str, tuple[int, int]] = {}
    verdict, style, status = "PASS: every result has the bits of the first pass, and memory is flat", "bold green", 0
    try:
        memory = soak(state, device, given.minutes, console, save)
        must_be_flat(memory)
    except Found as found:
        verdict, style, status = f"FAIL: {found}", "bold red", 1
    except KeyboardInterrupt:
        verdict, style, status = "interrupted: nothing differed so far", "yellow", 130
    console.print(summary(state, memory), markup=False)
    console.print(f"\n{verdict}", style=style, markup=False)
    return status


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
