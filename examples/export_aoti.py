"""Exports an MLA decode layer with any number of tokens, S >= 0, and packages it for C++ with AOTInductor.

    python examples/export_aoti.py layer.pt2                                   # and run the package from Python
    python examples/export_aoti.py layer.pt2 --runner <path of run_package>    # and from examples/aoti_runner, in C++

The package holds the weights. The process that runs it loads libmla_fp8.so, and needs neither Python nor this source.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import torch
from compile_layer import BF16_NOISE, DecodeLayer, inputs
from torch import Tensor

from mla_fp8._native import LIBRARY

HEADS, HIDDEN = 16, 512
TOKENS = (0, 1, 2, 300)


def run_in_cpp(runner: Path, package: Path, arguments: tuple[Tensor, ...]) -> Tensor:
    """What run_package makes of `arguments`, through files."""
    with tempfile.TemporaryDirectory() as directory:
        given, written = Path(directory) / "inputs.pt", Path(directory) / "outputs.pt"
        torch.save([argument.cpu() for argument in arguments], given)
        subprocess.run([runner, LIBRARY, package, given, written], check=True)
        (output,) = torch.load(written)
        return output


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="file to write, ends in .pt2")
    parser.add_argument("--runner", type=Path, help="run_package, built from examples/aoti_runner")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = DecodeLayer(HEADS, HIDDEN).to(device)

    tokens = torch.export.Dim("tokens", min=0, max=4096)
    shapes = ({0: tokens}, {0: tokens})
    program = torch.export.export(layer, inputs(7, HIDDEN, device), dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(options.package))
    packaged = torch._inductor.aoti_load_package(str(options.package))
    for s in TOKENS:
        arguments = inputs(s, HIDDEN, device)
        want = layer(*arguments).float()
        got = run_in_cpp(options.runner, options.package, arguments) if options.runner else packaged(*arguments)
        error = float((got.to(device).float() - want).norm())
        print(f"S = {s:3} on {device}: package against eager {error:.1e}, norm {float(want.norm()):.1e}")
        if got.shape != want.shape or not error <= BF16_NOISE * float(want.norm()):
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
