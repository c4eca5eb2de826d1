"""Who may import whom, read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import mla_fp8

PACKAGE = Path(mla_fp8.__file__).parent
SOURCES = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "benchmarks"]  # of a wheel
CHECK = {"cli/suite.py", "cli/compare.py"}  # `python -m mla_fp8 check`
CAPABILITY = "(9, 0)"


def imported(path: Path) -> set[str]:
    """Every module that a file may import, wherever in it: `from a import b` may be of module a.b too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_only_check_imports_the_specification():
    """The product must not lean on what it is compared with."""
    found = {str(path.relative_to(PACKAGE)) for path in SOURCES if "mla_fp8.reference" in imported(path)}
    assert found == CHECK


def test_only_devices_says_a_compute_capability():
    found = {path.name for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Tuple) and ast.unparse(node) == CAPABILITY}  # fmt: skip
    assert found == {"devices.py"}


def test_modules_are_attributes_and_cost_nothing_before():
    """README writes `mla_fp8.distributed.register_shardings()` after `import mla_fp8`."""
    code = (
        "import sys, mla_fp8\n"
        "names = ('attention', 'config', 'distributed', 'integrations', 'reference')\n"
        "early = [name for name in names if 'mla_fp8.' + name in sys.modules]\n"
        "assert not early, early\n"
        "assert callable(mla_fp8.distributed.register_shardings)\n"
        "assert all(getattr(mla_fp8, name) is sys.modules['mla_fp8.' + name] for name in names)\n"
        "assert not hasattr(mla_fp8, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
