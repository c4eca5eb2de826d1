"""What the tests' child processes may cost: no test waits longer than its limit, and nothing stays behind."""

import subprocess
import sys
import time

import processes
import pytest


def test_run_gives_output_and_status():
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = processes.run([sys.executable, "-c", code])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_run_fails_after_its_limit_and_shows_the_output():
    code = "import time; print('before', flush=True); time.sleep(60)"
    begin = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"still running after 2 s: .*python.* -c [\s\S]*before"):
        processes.run([sys.executable, "-c", code], seconds=2)
    assert time.monotonic() - begin < 2 + processes.SECONDS_TO_END


def test_run_ends_what_the_process_leaves_behind():
    """A child that keeps its parent's output open, as a compiler's worker may."""
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)"
    begin = time.monotonic()
    child = int(processes.run([sys.executable, "-c", code]).stdout)
    assert time.monotonic() - begin < processes.SECONDS
    while time.monotonic() - begin < processes.SECONDS:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True, timeout=60)
        if state.stdout.strip()[:1] in ("", "Z"):  # gone, or dead until whoever adopted it asks
            return
    pytest.fail(f"process {child} is alive")
