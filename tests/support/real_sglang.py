"""SGLang's own sources on a CPU: its hook registry, weight loader and MLA forward code run, the rest is stubbed.

MLA_FP8_SGLANG_SOURCE names a folder that holds `sglang`, as `pip download --no-deps sglang` and unzip make one. The
modules in REAL are executed as they are, and the functions in FUNCTIONS are cut out of files that want a GPU.
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

import torch

SOURCES = [Path(folder) for folder in os.environ.get("MLA_FP8_SGLANG_SOURCE", "").split(os.pathsep) if folder]
COMMON = "sglang.srt.models.deepseek_common"
REAL = {
    "sglang.srt.plugins",
    "sglang.srt.plugins.hook_registry",
    "sglang.srt.utils.offloader",
    f"{COMMON}.deepseek_weight_loader",
    f"{COMMON}.attention_forward_methods.forward_mla",
}
FUNCTIONS = {  # module -> what of its file is run
    "sglang.srt.utils": ("sglang/srt/utils/common.py", ["bind_or_assign"]),
    "sglang.srt.layers.quantization.fp8_utils": (
        "sglang/srt/layers/quantization/fp8_utils.py",
        ["block_quant_dequant"],
    ),
}
FLAGS = ("_is_cpu", "_is_cuda", "_is_fp8_fnuz", "_is_gfx95_supported", "_is_hip", "_is_musa", "_is_npu", "_is_xpu",
         "_is_cublas_ge_129", "_use_aiter", "_use_aiter_bpreshuffle_gfx95", "_use_aiter_gfx95")  # fmt: skip


class Anything(type):
    """A class that stands for whatever is asked of a stubbed module: a base class, a decorator, a false value."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return anything(name)

    def __call__(cls, *args, **kwargs):
        return args[0] if len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType) else cls

    def __bool__(cls):
        return False

    def __iter__(cls):
        return iter(())

    def __getitem__(cls, _):
        return cls

    def __or__(cls, _):
        return cls

    __ror__ = __or__


def anything(name):
    return Anything(name, (), {})


class Stub(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return anything(name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of sglang, and the packages that its modules want and this machine lacks."""

    def __init__(self, source: Path, lacking: tuple[str, ...] = ("triton", "sgl_kernel", "deep_gemm")):
        self.source, self.lacking = source, lacking

    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root != "sglang" and (root not in self.lacking or any(n == root for n in self.present())):
            return None
        if name in REAL:
            file = self.source / (name.replace(".", "/") + ".py")
            if not file.exists():
                file = self.source / name.replace(".", "/") / "__init__.py"
            folders = [str(file.parent)] if file.name == "__init__.py" else None
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def present(self):
        return [root for root in self.lacking if importlib.machinery.PathFinder.find_spec(root)]

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        module.__path__ = []
        if module.__name__ == f"{COMMON}.utils":
            vars(module).update(
                dict.fromkeys(FLAGS, False), _is_cuda=True, FORWARD_ABSORB_CORE_ATTENTION_BACKENDS=["fa3"]
            )
        elif module.__name__ == "sglang.srt.model_loader.utils":
            module.should_deepgemm_weight_requant_ue8m0 = lambda **options: False
        elif module.__name__ == "sglang.srt.runtime_context":
            module.get_lora = lambda: types.SimpleNamespace(enable_lora=None, lora_paths=None, lora_target_modules=None)
            module.get_model = lambda: types.SimpleNamespace(weight_cache_mode="off")
        elif module.__name__ in FUNCTIONS:
            file, names = FUNCTIONS[module.__name__]
            vars(module).update(cut_out(self.source / file, names))


def cut_out(file: Path, names: list[str]) -> dict:
    """Functions of a source file, without the rest of it."""
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in tree.body:
        node.returns = None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
    space = {"torch": torch}
    exec(compile(tree, str(file), "exec"), space)
    return {name: space[name] for name in names}


def install(monkeypatch, source: Path):
    """Make `sglang` this folder's, for one test; returns its hook registry, loader and forward modules."""
    for name in [name for name in sys.modules if name == "sglang" or name.startswith("sglang.")]:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    monkeypatch.setattr(sys, "meta_path", [Finder(source), *sys.meta_path])
    modules = [importlib.import_module(name) for name in sorted(REAL)]
    for name in set(sys.modules) - before:
        monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))  # gone again after the test
    return {"source": source, **{module.__name__.rpartition(".")[2]: module for module in modules}}
