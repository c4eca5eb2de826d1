"""docs/adding_an_op.md, followed to the letter in a copy of the tree, gives an op that passes the tests of all ops."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import torch

from mla_fp8 import _native

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding_an_op.md").read_text()
# A file, where in it, and the text that goes there.
STEP = re.compile(r"^([\w./\\]+), (new|at the end|(above|below|in place of) `(.+?)`):\n```\w+\n(.*?)^```$", re.S | re.M)
LIBRARY_SOURCE = "csrc/bindings/library.cpp"  # registers the op, and is compiled like any other of the library
# Those of all ops that a CPU runs in no time, and what knows the names of sources and public functions.
TESTS = [*(f"tests/ops/test_{name}.py" for name in ("row_amax", "ops_batch_invariance", "ops_extremes", "ops_fake",
           "ops_out", "ops_rejects", "ops_rejects_out")), "tests/docs/test_ops_docs.py"]  # fmt: skip


def compile_commands() -> list[dict]:
    """Of `make setup`, for this Python."""
    (commands,) = ROOT.glob(f"build/cp{sys.version_info.major}{sys.version_info.minor}-*/compile_commands.json")
    return json.loads(commands.read_text())


def follow(name: str, where: str, side: str, anchor: str, text: str, tree: Path) -> str:
    """One step of the page; returns the file's name."""
    name = name.replace("\\", "")
    path = tree / name
    if where == "new":
        assert not path.exists(), f"{name} is there already"
        old = ""
    else:
        old = path.read_text()
    assert not anchor or old.count(anchor) == 1, f"{name} must have {anchor!r} once, got {old.count(anchor)}"
    put = {
        "above": text + anchor,
        "below": f"{anchor}\n{text}".removesuffix("\n"),
        "in place of": text.removesuffix("\n"),
    }
    path.write_text(old.replace(anchor, put[side]) if anchor else f"{old}\n\n{text}".lstrip("\n"))
    return name


def build(tree: Path, sources: set[str]) -> None:
    """The library from the objects of `make setup`, but for these sources."""
    commands = {entry["file"]: entry for entry in compile_commands() if "_config.dir" not in entry["output"]}
    like = commands[str(ROOT / LIBRARY_SOURCE)]

    def compiled(source: str) -> Path:
        out = tree / f"{Path(source).stem}.o"
        words = shlex.split(like["command"].replace(f"{ROOT}/csrc", f"{tree}/csrc"))
        words[words.index("-o") + 1], words[words.index("-c") + 1] = str(out), str(tree / source)
        subprocess.run(words, cwd=tree, check=True, timeout=processes.SECONDS)
        return out

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, sources))
    kept = [entry["output"] for file, entry in commands.items() if file != like["file"]]
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    link = ["g++", "-shared", "-o", tree / "mla_fp8" / _native.LIBRARY.name, *objects, *kept, torch_cpu]
    subprocess.run(link, cwd=like["directory"], check=True, timeout=processes.SECONDS)


def test_page_followed_to_the_letter_adds_an_op(tmp_path):
    for name in ("CMakeLists.txt", "pyproject.toml", "csrc", "mla_fp8", "docs", "tests"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    touched = {follow(*step, tmp_path) for step in STEP.findall(PAGE)}
    assert PAGE.count("\n```\n") == len(STEP.findall(PAGE)) + 1, "each block but the last one, a command, is a step"
    sources = {name for name in touched if name.endswith(".cpp")}
    missing = [name for name in sources if name not in (tmp_path / "CMakeLists.txt").read_text()]
    assert not missing
    build(tmp_path, sources)
    for path in _native.LIBRARY.parent.glob("_config*.so"):
        shutil.copy(path, tmp_path / "mla_fp8")
    # -S: without .pth files, so that the editable install does not put its package before this one.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [tmp_path, *filter(None, sys.path)]))}
    command = [sys.executable, "-S", "-m", "pytest", "-q", "-m", "not gpu", "-k", "row_amax", *TESTS]
    done = processes.run(command, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
