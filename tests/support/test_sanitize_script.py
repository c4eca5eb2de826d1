"""tests/support/sanitize.sh, with a compute-sanitizer that only prints: what it makes of each tool's answer."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from mla_fp8.config import tiles

SCRIPT = Path(__file__).with_name("sanitize.sh")
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
CLEAN, CLEAN_RACES = "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
STAND_IN = """#!/bin/sh
tool=$2
answer="{clean}"
if [ $tool = racecheck ]; then answer="{clean_races}"; fi
passed="12 passed in 3.21s"
status=0
{change}
echo "$passed"
echo "========= $answer"
exit $status
"""


@pytest.fixture
def sanitize(tmp_path):
    (tmp_path / "tests" / "support").mkdir(parents=True)
    copy = tmp_path / "tests" / "support" / SCRIPT.name  # its logs go to the root above them
    copy.write_bytes(SCRIPT.read_bytes())

    def run(*tools: str, change: str = "", stand_in: bool = True) -> tuple[int, list[str], str]:
        """Status, the lines of the summary, what went to stderr."""
        tool = tmp_path / "compute-sanitizer"
        tool.unlink(missing_ok=True)
        if stand_in:
            tool.write_text(STAND_IN.format(clean=CLEAN, clean_races=CLEAN_RACES, change=change))
            tool.chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        ran = subprocess.run(["bash", copy, *tools], capture_output=True, text=True, env=environment, timeout=60)
        return ran.returncode, ran.stdout.rpartition("\n\n")[2].splitlines(), ran.stderr

    return run


def test_sanitize_runs_all_four_tools(sanitize):
    status, lines, _ = sanitize()
    assert status == 0 and [line.split()[:2] for line in lines] == [[tool, "ok"] for tool in TOOLS]
    assert lines[1].startswith("racecheck  ok      0 hazards (0 errors, 0 warnings), 12 passed, status 0, ")


@pytest.mark.parametrize(
    ("tool", "change"),
    [
        ("memcheck", 'status=9; answer="ERROR SUMMARY: 3 errors"'),
        ("racecheck", 'answer="RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)"'),
        ("initcheck", 'echo "========= ERROR SUMMARY: 2 errors"'),  # of a child process, before the parent's 0
        ("synccheck", 'status=1; passed="1 failed, 11 passed in 3.21s"'),
        ("memcheck", 'passed="no tests ran in 0.01s"'),
        ("memcheck", "answer=gone"),
    ],
)
def test_sanitize_fails_for_one_tool_and_runs_the_others(sanitize, tool, change):
    status, lines, _ = sanitize(change=f"if [ $tool = {tool} ]; then {change}; fi")
    verdicts = {line.split()[0]: line.split()[1] for line in lines}
    assert status == 1 and verdicts == {name: "FAILED" if name == tool else "ok" for name in TOOLS}


def test_sanitize_takes_single_tools(sanitize):
    assert [line.split()[0] for line in sanitize("synccheck", "memcheck")[1]] == ["synccheck", "memcheck"]


def test_sanitize_has_racecheck_look_at_our_kernels_and_no_others(sanitize, tmp_path):
    sanitize(change='echo "given: $*"')
    given = {tool: (tmp_path / "build" / "sanitize" / f"{tool}.log").read_text() for tool in TOOLS}
    names = {tool: re.findall(r"--kernel-name kns=(\S+)", text) for tool, text in given.items()}
    assert all("given: --tool" in text for text in given.values())
    assert [tool for tool in TOOLS if names[tool]] == ["racecheck"]
    assert not [tile.symbol for tile in tiles() if not any(name in tile.symbol for name in names["racecheck"])]


def test_sanitize_names_what_is_missing(sanitize):
    assert sanitize("valgrind")[::2] == (2, f"sanitize.sh: a tool must be one of {' '.join(TOOLS)}, got valgrind\n")
    status, _, printed = sanitize(stand_in=False)
    assert status == 2 and printed.startswith("sanitize.sh: compute-sanitizer must be on the PATH, got none")
