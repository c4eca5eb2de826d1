"""What the package promises: every public name, as docs/reference.py lists the modules that have them."""

import importlib
import importlib.util
import inspect
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def reference_script():
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names() -> dict[str, tuple[str, ...]]:
    """Module -> its public names, and dotted those of its Python classes' own methods and properties."""
    found = {}
    for module in reference_script().MODULES:
        public = importlib.import_module(module)
        methods = [
            f"{name}.{method}"
            for name in public.__all__
            if inspect.isclass(getattr(public, name)) and getattr(public, name).__module__ != "mla_fp8._config"
            for method, value in vars(getattr(public, name)).items()
            if not method.startswith("_") and (callable(value) or isinstance(value, (property, classmethod)))
        ]
        found[module] = (*public.__all__, *methods)
    return found


def value_of(module: str, name: str):
    value = importlib.import_module(module)
    for part in name.split("."):
        value = inspect.getattr_static(value, part)
    return getattr(value, "__func__", value)
