"""Programs packaged by AOTInductor run in a C++ process without Python, and give the eager bits for any S."""

import functools
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import helpers
import processes
import pytest
import torch

import mla_fp8
from mla_fp8._native import LIBRARY

ROOT = Path(__file__).parents[2]
HEADS = 3
MOST_TOKENS = 4096
COMPILING_SECONDS = 300  # of the example, which packages for a GPU with whatever else compiles at that time
BIN = (
    f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # make setup installs cmake beside python
)

pytestmark = pytest.mark.xdist_group("aoti")  # the fixtures compile: once, not in every worker


@pytest.fixture(scope="module", autouse=True)
def driver_for_the_linker(tmp_path_factory):
    """AOTInductor links programs for a GPU with -lcuda, and not every machine has a libcuda.so where ld looks."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.init()
    driver = re.search(r"/\S*/libcuda\.so\S*", Path("/proc/self/maps").read_text())
    assert driver, "a process that uses CUDA has its driver mapped"
    directory = tmp_path_factory.mktemp("driver")
    (directory / "libcuda.so").symlink_to(driver[0])
    paths = [str(directory), os.environ.get("LIBRARY_PATH")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBRARY_PATH", os.pathsep.join(filter(None, paths)))
        yield


def assert_shares_libstdcxx(binary):
    """A crash of torch's own code is the alternative: docs/troubleshooting.md, Segmentation fault."""
    assert b"libstdc++.so" in binary, "the C++ compiler (CXX, else g++) must link libstdc++.so, it linked libstdc++.a"


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """run_package, built as its CMakeLists.txt says."""
    build = tmp_path_factory.mktemp("aoti_runner")
    cmake = shutil.which("cmake", path=BIN)
    assert cmake, "cmake must be on the PATH or beside python: it builds this package too"
    ninja = ["-G", "Ninja"] if shutil.which("ninja", path=BIN) else []
    torch_dir = f"-DTORCH_DIR={Path(torch.__file__).parent}"
    for command in (["-S", ROOT / "examples/aoti_runner", "-B", build, torch_dir, *ninja], ["--build", build]):
        done = processes.run([cmake, *command], env=os.environ | {"PATH": BIN})
        assert done.returncode == 0, done.stdout + done.stderr
    assert_shares_libstdcxx((build / "run_package").read_bytes())
    return build / "run_package"


class Program(torch.nn.Module):
    """Every op, with and without optional arguments, in both modes, and a writing overload into a view."""

    def __init__(self, generator):
        super().__init__()
        kv_b_proj = helpers.randn(generator, HEADS * 256, 512, dtype=torch.bfloat16)
        self.weights = mla_fp8.AbsorbedWeights.from_bf16(kv_b_proj, HEADS)
        self.register_buffer("out_scale", torch.tensor([0.3]))

    def forward(self, q, o_latent):
        w_uk, w_uk_scale, w_uv, w_uv_scale = self.weights.buffers()
        q_nope, q_pe = q.split([128, 64], dim=-1)
        q_val, q_scale = mla_fp8.quantize_q_nope(q_nope)
        attention_q = q.new_empty(q.shape[0], q.shape[1], 576)
        mla_fp8.absorb_q(q_nope, w_uk, w_uk_scale, activations="fp8", out=attention_q[..., :512])
        attention_q[..., 512:] = q_pe
        return (
            q_val,
            q_scale,
            mla_fp8.bmm(q_val, q_scale, w_uk, w_uk_scale, m=q.shape[0]),
            attention_q,
            mla_fp8.absorb_q(q_nope, w_uk, w_uk_scale, q_pe, self.out_scale),
            mla_fp8.v_up(o_latent, w_uv, w_uv_scale),
            mla_fp8.v_up(o_latent, w_uv, w_uv_scale, activations="fp8"),
            *mla_fp8.v_up_quantized(o_latent, w_uv, w_uv_scale),
            *mla_fp8.v_up_quantized(o_latent, w_uv, w_uv_scale, activations="fp8"),
        )


def inputs(generator, s, device):
    shapes = ((s, HEADS, 192), (s, HEADS, 512))
    return tuple(helpers.randn(generator, *shape, dtype=torch.bfloat16, device=device) for shape in shapes)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory, pytestconfig):
    """Device -> the program and its package, made once."""
    directory = tmp_path_factory.mktemp("packages")

    @functools.cache
    @torch.no_grad()
    def make(device):
        generator = torch.Generator().manual_seed(pytestconfig.option.seed)
        program, tokens = Program(generator).to(device), torch.export.Dim("tokens", min=0, max=MOST_TOKENS)
        shapes = ({0: tokens}, {0: tokens})
        exported = torch.export.export(program, inputs(generator, 7, device), dynamic_shapes=shapes)
        path = str(directory / f"{device}.pt2")
        torch._inductor.aoti_compile_and_package(exported, package_path=path)
        with zipfile.ZipFile(path) as package:
            (library,) = (name for name in package.namelist() if name.endswith(".so"))
            assert_shares_libstdcxx(package.read(library))
        return program, path

    return make


def run(runner, package, arguments, directory, **environment):
    """What the process printed, and what it made of `arguments`, on their device."""
    given, written = directory / "inputs.pt", directory / "outputs.pt"
    torch.save([argument.cpu() for argument in arguments], given)
    command = [runner, LIBRARY, package, given, written]
    done = processes.run(command, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), [output.to(arguments[0].device) for output in torch.load(written)]


@pytest.mark.parametrize("s", [0, 1, 4, 5, 300])
def test_ops_packaged_give_the_eager_bits_in_cpp(rng, device, runner, packaged, tmp_path, s):
    program, package = packaged(device)
    arguments = inputs(rng, s, device)
    want = program(*arguments)
    lines, outputs = run(runner, package, arguments, tmp_path)
    for line, got, expected in zip(lines, outputs, want, strict=True):
        assert line.split(" ", 1)[1] == f"{list(expected.shape)} strides {list(expected.stride())}"
        helpers.assert_same_bits(got.view(expected.dtype), expected)


def test_ops_packaged_run_without_python(rng, device, runner, packaged, tmp_path):
    _, package = packaged(device)
    listing = {"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(tmp_path / "loaded")}  # the loader writes to loaded.<pid>
    run(runner, package, inputs(rng, 5, device), tmp_path, **listing)
    logs = [log.read_text() for log in tmp_path.glob("loaded.*")]  # a GPU's driver may start a helper
    loaded = set(re.findall(r"calling init: \S*/(\S+)", "".join(logs)))
    assert {"libtorch_cpu.so", LIBRARY.name} <= loaded
    assert not [name for name in loaded if "python" in name]


@pytest.mark.parametrize(
    "given, message",
    [
        (["/nowhere/libmla_fp8.so", "package.pt2", "inputs.pt", "outputs.pt"], "/nowhere/libmla_fp8.so: cannot open"),
        (
            [LIBRARY, "/nowhere/package.pt2", "inputs.pt", "outputs.pt"],
            "package.pt2 must be a readable file, got /nowhere",
        ),
        ([LIBRARY], "usage: run_package"),
    ],
)
def test_runner_rejects(runner, given, message):
    done = processes.run([runner, *given])
    assert done.returncode == (1 if len(given) > 1 else 2)
    assert message in done.stderr


def test_example_export_aoti_runs_in_cpp(device, runner, tmp_path):
    script = ROOT / "examples" / "export_aoti.py"
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    command = [sys.executable, script, tmp_path / "layer.pt2", "--runner", runner]
    done = processes.run(command, COMPILING_SECONDS, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f" on {device}: package against eager") == 4
