"""The house rules that no formatter knows: `make lint` runs this, and prints a line for each place that breaks one.

    python tests/support/lint.py

CONTRIBUTING.md says what each rule is for.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import public_api

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = "mla_fp8|csrc|docs|tests|examples|benchmarks|cmake|build_support"
PYTHON = ("mla_fp8", "benchmarks", "examples")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HISTORY = {"docs/notes.md"}  # names what was there on its day
CPP = (".h", ".cpp", ".cu", ".cuh")
CSRC = sorted(path for path in ROOT.glob("csrc/**/*.*") if path.suffix in CPP)
CPP_ELSEWHERE = sorted(
    path for folder in ("tests", "examples") for path in (ROOT / folder).rglob("*.*") if path.suffix in CPP
)
CMAKE = [ROOT / "CMakeLists.txt", *sorted(ROOT.glob("cmake/*.cmake"))]
COLUMNS = 100
FUNCTION_LINES = 60
EXAMPLE_LINES = {"mla_decode.py": 200}  # else 60: an example is read in one go

# "rule file" a line: files that do not keep a rule yet. It ends empty, and goes with NOT_YET; no new file may enter it.
NOT_YET = set((Path(__file__).with_name("lint_not_yet.txt")).read_text().splitlines())

# csrc: a folder -> the folders whose headers it may include beside its own and csrc's. None reaches up. The headers of
# csrc itself (types.h, constants.h, product.h) stand below every folder.
MAY_INCLUDE = {
    "bindings": {"gpu", "cpu", "config", "kernels"},
    "gpu": {"config", "kernels"},
    "cpu": set(),
    "config": {"kernels"},
    "kernels": set(),
}
# One prologue holds the launch order of dependent kernels, so only it can get the order wrong.
ONLY_INCLUDED_BY = {"kernels/ptx/griddepcontrol.cuh": "kernels/grid.cuh"}

# Python: a module of the package -> who may import it, as the start of a path. The product does not lean on its own
# specification, and nothing but the command line, of which the benchmarks are a command, knows the command line.
ONLY_IMPORTED_BY = {
    "mla_fp8.reference": ("benchmarks/", "mla_fp8/cli/check.py", "mla_fp8/cli/compare.py", "mla_fp8/cli/suite.py"),
    "mla_fp8.cli": ("benchmarks/", "mla_fp8/cli/", "mla_fp8/__main__.py"),
    "mla_fp8.integrations": ("benchmarks/", "examples/", "mla_fp8/cli/", "mla_fp8/integrations/"),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def paragraphs(page: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and lines of a page that are neither code, nor of a table, nor written by a script."""
    fenced = generated = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fenced ^= line.startswith("```")
        generated = (generated or line.startswith("<!-- table")) and not line.startswith("<!-- end")
        if not (fenced or generated or line.startswith(("```", "|", "    ", "<"))):
            yield number, line


def wide_prose() -> Iterator[str]:
    """Wide prose is not read, least of all in a diff. A table may be wide: columns stand two spaces apart."""
    for page in PAGES:
        for number, line in paragraphs(page):
            if len(line) > COLUMNS and "](" not in line:
                yield f"{name_of(page)}:{number}: prose must end by column {COLUMNS}, got {len(line)}"
    for path in CSRC + CPP_ELSEWHERE + CMAKE:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            comment = re.search(r"# ?(.*)" if path in CMAKE else r"//+ ?(.*)", line)
            if comment and len(line) > COLUMNS and "  " not in comment[1].strip():
                yield f"{name_of(path)}:{number}: a comment must end by column {COLUMNS}, got {len(line)}"


def without_words(source: str) -> str:
    """C++ of the same lines, without comments, strings and directives of the preprocessor."""
    words = r"""//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)'|^ *#(?:[^\n]*\\\n)*[^\n]*"""
    return re.sub(words, lambda found: "\n" * found[0].count("\n"), source, flags=re.DOTALL | re.MULTILINE)


def functions(source: str) -> Iterator[tuple[str, int, int]]:
    """Header, first line and number of lines of every function with a body."""
    code, head, opened = without_words(source), 0, []
    for mark in re.finditer(r"[{};]", code):
        text = code[head : mark.start()]
        if mark[0] == "{":
            opened.append((text, head + len(text) - len(text.lstrip())))
        elif mark[0] == "}" and opened:
            header, start = opened.pop()
            is_function = re.search(r"\w\s*\(.*\)[^()=]*$|\)\s*:\s.*\)$", header, re.DOTALL)
            if is_function and not re.match(r"\s*(if|for|while|switch|do|else|catch|return|namespace)\b", header):
                first = code.count("\n", 0, start)
                yield " ".join(header.split()), first + 1, code.count("\n", 0, mark.start()) - first + 1
        head = mark.end()


def long_functions() -> Iterator[str]:
    for path in CSRC:
        for header, line, lines in functions(path.read_text()):
            if lines > FUNCTION_LINES:
                where = f"{name_of(path)}:{line}: {header[-60:]}"
                yield f"{where} must have {FUNCTION_LINES} lines at most, got {lines}"


def long_examples() -> Iterator[str]:
    for path in sorted(ROOT.glob("examples/*.py")):
        lines, most = len(path.read_text().splitlines()), EXAMPLE_LINES.get(path.name, 60)
        if lines > most:
            yield f"{name_of(path)}: must have {most} lines at most, got {lines}"


def included(path: Path) -> list[str]:
    return re.findall(r'^#include "(.+?)"', path.read_text(), re.MULTILINE)


def includes_that_reach_up() -> Iterator[str]:
    for path in CSRC:
        name = str(path.relative_to(ROOT / "csrc"))
        folder = name.split("/")[0] if "/" in name else ""
        for header in included(path):
            other = header.split("/")[0] if "/" in header else ""
            allowed = MAY_INCLUDE.get(folder, set()) | {folder, ""}
            only = ONLY_INCLUDED_BY.get(header, name)
            if other not in allowed or (only != name and (ROOT / "csrc" / only).exists()):
                yield f"csrc/{name}: must not include {header}"


def imported(path: Path) -> Iterator[str]:
    """Dotted names of this package's modules, also of those imported inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_that_reach_up() -> Iterator[str]:
    for path in (path for folder in PYTHON for path in sorted(ROOT.glob(f"{folder}/**/*.py"))):
        for module in imported(path):
            for owned, importers in ONLY_IMPORTED_BY.items():
                if f"{module}.".startswith(f"{owned}.") and not name_of(path).startswith(importers):
                    yield f"{name_of(path)}: must not import {module}"


def names_of_files() -> Iterator[str]:
    """Files that a page names exist, links lead somewhere; op_<op>.cpp stands for every file of that form."""
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(
            r"\b(?:mla_fp8|csrc|docs|tests|examples|benchmarks|cmake|build_support)/[\w./<>]*[\w>]", text
        ):
            if name_of(page) not in HISTORY and not any(ROOT.glob(re.sub(r"<\w+>", "*", name))):
                yield f"{name_of(page)}: names {name}, which does not exist"
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            there = (page.parent / target) if target else page
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if there.is_file() else []
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            if not there.exists() or (anchor and anchor not in slugs):
                yield f"{name_of(page)}: links to {target}#{anchor}, which does not exist"
        listed = page.name in (ROOT / "docs" / "README.md").read_text()
        if page.parent == ROOT / "docs" and page.name != "README.md" and not listed:
            yield f"docs/README.md: must list {page.name}"


SECTIONS = ("Args", "Returns", "Raises")


def docstrings() -> Iterator[str]:
    """A public function says what it takes, returns and raises; an op also what it notes, where it is from, and how."""
    for module, names in public_api.names().items():
        for name in names:
            value, where = public_api.value_of(module, name), f"{module}.{name}"
            text = inspect.getdoc(value) or ""
            if not text:
                yield f"{where}: must have a docstring"
            if not inspect.isfunction(value) or module == "mla_fp8.reference":  # whose code is the documentation
                continue
            taken = [p for p in inspect.signature(value).parameters if p not in ("self", "cls")]
            wanted = SECTIONS[0 if taken else 1 :] if taken or "." not in name else ()
            if module == "mla_fp8" and "." not in name:
                wanted = (*wanted, "Notes", "Source", "Example")
            for section in wanted:
                if not re.search(rf"\b{section}:", text):
                    yield f"{where}: its docstring must have the section {section}:"
            for parameter in taken:
                if "Args:" in text and not re.search(rf"\b{parameter}\b", text.split("Args:")[1]):
                    yield f"{where}: its Args: must name {parameter}"


RULES = (
    names_of_files,
    docstrings,
    wide_prose,
    long_functions,
    long_examples,
    includes_that_reach_up,
    imports_that_reach_up,
)


def main() -> int:
    broken = 0
    for rule in RULES:
        for said in rule():
            file = said.split(":")[0].split("/")[-1]
            if f"{rule.__name__} {file}" not in NOT_YET:
                print(said)
                broken += 1
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main())
