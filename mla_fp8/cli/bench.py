"""`bench`: runs benchmarks/gpu.py or cpu.py, which are installed with the package, in a process of its own."""

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import mla_fp8
from mla_fp8.cli import EXIT_USAGE, Commands, integer_of, positive_ranges
from mla_fp8.cli.terminal import Terminal
from mla_fp8.formats import MODES

# name -> module
PEERS = {"Triton": "triton", "DeepGEMM": "deep_gemm", "FlashInfer": "flashinfer", "humming": "humming"}
CPU_OPS = {"front": "absorb_q", "back": "v_up"}
QUICK_CPU = ["--rounds", "10"]
DESCRIPTION = """\
Time the ops here beside what else is installed: on a GPU torch.bmm, Triton,
DeepGEMM, FlashInfer, humming and one launch that only moves the same bytes;
on a CPU torch.bmm. Everything is compared with the reference first: a wrong
result ends the run with status 1. Errors are from exact arithmetic on the FP8
checkpoint.
Status 2: the options do not fit; 3: an op of mla_fp8 failed. Under each table
stands the command that measures it again."""
DRAWN = (".svg", ".png")


def add(commands: Commands) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "bench",
        help="time the ops here beside what else is installed",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    command.add_argument("--s", type=positive_ranges, help="tokens, as in 1,16,64; default: a range of them")
    command.add_argument("--heads", type=positive_ranges, default=[128], help="as in 128,16; default: 128")
    command.add_argument(
        "--sides",
        default="front,back",
        help="front (absorb_q), back (v_up), and on a GPU front512, front576, front576_fp8, back_fp8, gemm; "
        "default: %(default)s",
    )
    command.add_argument("--activations", choices=MODES, help="of the ops; default: both, a row each")
    command.add_argument("--rounds", type=integer_of(2, 1_000_000), help="samples of each contender")
    command.add_argument("--threads", type=integer_of(1, 1024), help="of a CPU; default: 2")
    command.add_argument("--quick", action="store_true", help="fewer shapes, rounds and configurations")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the rows and where they come from")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw time over S (.svg or .png); needs matplotlib")
    return command


def run(given: argparse.Namespace) -> int:
    import torch

    from mla_fp8.cli.facts import no_cuda

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"bench: --device must be cpu, got cuda: {no_cuda()}")
        command = gpu_command(given) if device == "cuda" else cpu_command(given)
        check_files(given)
        check_rich()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    Terminal().print(
        f"{device}: mla_fp8 {mla_fp8.__version__}, torch {torch.__version__}" + f"; {peers()}" * (device == "cuda")
    )
    return subprocess.run([sys.executable, *command]).returncode


def check_rich() -> None:
    if importlib.util.find_spec("rich") is None:
        raise ValueError("bench: the benchmarks need rich: pip install mla_fp8[cli]")


def check_files(given: argparse.Namespace) -> None:
    """Before minutes of measuring, not after them."""
    if given.plot and given.plot.suffix not in DRAWN:
        raise ValueError(f"bench: --plot must end in {' or '.join(DRAWN)}, got {given.plot}")
    if given.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("bench: --plot needs matplotlib: pip install mla_fp8[bench]")
    for option, file in (("--json", given.json), ("--plot", given.plot)):
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            writable = not file.is_dir() and os.access(file if file.exists() else file.parent, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise ValueError(f"bench: {option} must be a file that can be written, got {file}")


def directory() -> Path:
    """The benchmarks: installed beside this package, or the checkout's in an editable install."""
    package = Path(__file__).resolve().parent.parent
    for found in (package / "benchmarks", package.parent / "benchmarks"):
        if (found / "gpu.py").is_file():
            return found
    raise FileNotFoundError(f"bench: the benchmarks must be in {package / 'benchmarks'}, got none: reinstall mla_fp8")


def as_package(script: str) -> str:
    """Makes the folder of a script that runs by its path a package, whose name the script takes for its own.

    So its modules import each other as they do in `python -m benchmarks.gpu`, wherever the folder is installed.
    """
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(Path(script).resolve().parent)]
    sys.modules[package.__name__] = package
    return package.__name__


def peers() -> str:
    """What else is there to compare with; a package that is there but broken shows in the tables."""
    return "; ".join(f"{name} {_version(module)}" for name, module in PEERS.items())


def _version(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return "not installed"
    packages = importlib.metadata.packages_distributions().get(module)
    return importlib.metadata.version(packages[0]) if packages else "of unknown version"


def gpu_command(given: argparse.Namespace) -> list[str]:
    if given.threads is not None:
        raise ValueError("bench: --threads must be left out on cuda, got it")
    options = ["--heads", _commas(given.heads), "--sides", given.sides] + ["--quick"] * given.quick
    options += ["--s", _commas(given.s)] if given.s else []
    options += ["--replays", str(given.rounds)] if given.rounds else []
    options += ["--activations", given.activations] if given.activations else []
    return [str(directory() / "gpu.py"), *options, *_files(given)]


def cpu_command(given: argparse.Namespace) -> list[str]:
    sides = given.sides.split(",")
    wrong = [side for side in sides if side not in CPU_OPS]
    if wrong:
        raise ValueError(f"bench: --sides must be front or back on cpu, got {wrong[0]}")
    options = ["--op", *(CPU_OPS[side] for side in sides), "--heads", *map(str, given.heads)]
    options += ["--s", *map(str, given.s)] if given.s else []
    options += ["--threads", str(given.threads)] if given.threads else []
    options += ["--activations", given.activations] if given.activations else []
    options += ["--rounds", str(given.rounds)] if given.rounds else QUICK_CPU if given.quick else []
    return [str(directory() / "cpu.py"), *options, *_files(given)]


def _files(given: argparse.Namespace) -> list[str]:
    files = {"--json": given.json, "--plot": given.plot}
    return [word for option, file in files.items() if file for word in (option, str(file))]


def _commas(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))
