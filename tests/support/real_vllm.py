"""vLLM's own MLAAttention on a CPU, without vLLM: its class and `replace_parameter` are run, the rest is stubbed.

MLA_FP8_VLLM_SOURCE names folders that hold `vllm`, as `pip download --no-deps vllm` and unzip make one. Of the class
all is as it is but the constructor's body, which wants a GPU: it keeps what it is given.
"""

import ast
import importlib.util
import os
import sys
from pathlib import Path

from mla_fp8.integrations.vllm_engine import CLASS, CONFIG, MODULE

SOURCES = [Path(folder) for folder in os.environ.get("MLA_FP8_VLLM_SOURCE", "").split(os.pathsep) if folder]
ATTENTION, UTILITIES = "vllm/model_executor/layers/attention/mla_attention.py", "vllm/model_executor/utils.py"
HEAD = """from __future__ import annotations
from typing import Any, ClassVar, cast
import torch
from torch import nn
class AttentionLayerBase: pass
class Impl:
    def process_weights_after_loading(self, act_dtype): pass
def get_and_maybe_dequant_weights(layer, out_dtype): return layer.quant_method.dequantize(layer, out_dtype)
def should_load_quant_weights(quant_method): return True
"""
CONSTRUCTED = """
super().__init__()
self.__dict__.update({name: value for name, value in locals().items() if name not in ("self", "kv_b_proj")})
self.kv_b_proj, self.quant_config, self.impl = kv_b_proj, None, Impl()
self.is_aiter_triton_fp4_bmm_enabled = self.is_aiter_triton_fp8_bmm_enabled = self.is_amx_bmm_enabled = False
"""


def parsed(path: Path) -> dict[str, ast.stmt]:
    """The classes and functions of a file, by name."""
    found = ast.parse(path.read_text()).body
    return {node.name: node for node in found if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


def attention_class(source: Path) -> ast.ClassDef:
    found = parsed(source / ATTENTION)[CLASS]
    assert isinstance(found, ast.ClassDef)
    return found


def names_and_source(source: Path) -> tuple[list[str], str]:
    """What `find` looks at, of the class as it is: parameters and functions, and its text."""
    found = attention_class(source)
    methods = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
    parameters = methods["__init__"].args
    names = [each.arg for each in [*parameters.args, *parameters.kwonlyargs]] + list(methods)
    config = ast.parse((source / "vllm/config/__init__.py").read_text()).body
    names += [alias.name for node in config if isinstance(node, ast.ImportFrom) for alias in node.names]
    return names, ast.get_source_segment((source / ATTENTION).read_text(), found) or ""


def install(monkeypatch, tmp_path: Path, source: Path):
    """Make `vllm` importable with that class; returns it, not yet hooked."""
    found = attention_class(source)
    (constructor,) = (node for node in found.body if getattr(node, "name", "") == "__init__")
    constructor.body = ast.parse(CONSTRUCTED).body
    functions = parsed(source / UTILITIES)["replace_parameter"], parsed(source / ATTENTION).get("split_kv_b_proj")
    file = tmp_path / "mla_attention.py"
    file.write_text(HEAD + "\n".join(ast.unparse(node) for node in (*functions, found) if node))
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in sorted({".".join(n.split(".")[: i + 1]) for n in (MODULE, CONFIG) for i in range(n.count(".") + 1)}):
        package = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader=None, is_package=True))
        monkeypatch.setitem(sys.modules, name, package)
    sys.modules[CONFIG].get_current_vllm_config_or_none = lambda: None
    spec = importlib.util.spec_from_file_location(MODULE, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, MODULE, module)
    spec.loader.exec_module(module)
    return getattr(module, CLASS)
