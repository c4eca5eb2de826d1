"""Measures the committed records again, each by its own command, and writes them where tables.py
finds them.

    python benchmarks/record.py                    all that a GPU can measure, or without one what a CPU can
    python benchmarks/record.py gpu tiles          these
    python benchmarks/record.py --into build/results --commit abc1234
    python benchmarks/record.py --list             the commands

Then `python -m benchmarks.bench.tables` fills the tables of README and docs. Status 1: a command
failed, and the others ran.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from mla_fp8.cli.bench import as_package

if not __package__:
    __package__ = as_package(__file__)

from .bench.report import HERE, RESULTS

GPU = "benchmarks/gpu.py"
ON_GPU = {
    "gpu": f"{GPU} --s 1,16,64,128,512,2048,8192 --sides front,back,gemm",
    "rows": f"{GPU} --quick --s 4,32,256,1024,65536 --sides front,back",
    "heads": f"{GPU} --quick --replays 20 --heads 8,16,32,64 --s 1,16,128,1024 --sides front512,back,back_fp8",
    "tiles": "benchmarks/tiles.py",
    "chain": f"{GPU} --chain",
    "host": f"{GPU} --host",
    "quantize": f"{GPU} --quantize",
    "decode_step": "-m benchmarks.layers.decode_step",
    "dram_bytes": f"{GPU} --dram-bytes",
    "prefill": "-m benchmarks.layers.prefill",
    "tensor_parallel": "-m benchmarks.layers.tensor_parallel",
}
ON_CPU = {
    "cpu": "benchmarks/cpu.py",
    "quality": "-m benchmarks.quality.evaluate",
    "rounding": "-m benchmarks.quality.rounding",
}
COMMANDS = ON_GPU | ON_CPU
# By hand, as an engine has to be there: benchmarks/engines/vllm_run.py twice and oracle.py make the three files.
IN_AN_ENGINE = {"vllm": "-m benchmarks.engines.compare stock.json plugin.json oracle.json --record vllm.json"}
SEVERAL_GPUS = "tensor_parallel"


def file_of(name: str, gpu: str) -> str:
    """`gpu` is a record a device: h100.json on an NVIDIA H100 80GB HBM3."""
    return f"{gpu.split()[1].lower() if name == 'gpu' and gpu else name}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMMANDS)}")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder; default: %(default)s")
    parser.add_argument("--commit", help="for the JSON rows, where git cannot tell")
    parser.add_argument("--list", action="store_true", help="print the commands and measure nothing")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in COMMANDS]:
        parser.error(f"NAME must be one of {', '.join(COMMANDS)}, got {unknown[0]}")
    if options.list:
        every = COMMANDS | IN_AN_ENGINE
        for name in options.names or every:
            print(f"{name:<15} python {every[name]}")
        return 0
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    here = [name for name in ON_GPU if name != SEVERAL_GPUS or torch.cuda.device_count() > 1] if gpu else list(ON_CPU)
    failed = False
    for name in options.names or here:
        file = options.into.resolve() / file_of(name, gpu)
        command = [sys.executable, *shlex.split(COMMANDS[name]), "--json", str(file)]
        if options.commit and name in ON_GPU:
            command += ["--commit", options.commit]
        began = time.monotonic()
        status = subprocess.run(command, cwd=HERE.parent).returncode
        print(f"{name}: status {status}, {time.monotonic() - began:.0f} s, {file}", flush=True)
        failed |= bool(status)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
