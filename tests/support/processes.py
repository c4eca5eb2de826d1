"""Child processes that no test waits for longer than its limit, and none leaves behind."""

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile

import pytest

SECONDS = 60  # for a process, and for whatever processes wait for among themselves
SECONDS_TO_END = 5  # torchrun, asked to end, ends its workers first


def run(command, seconds=SECONDS, **options) -> subprocess.CompletedProcess:
    """subprocess.run with its output as text; after `seconds` the test fails and shows the output so far.

    Output goes to files: a pipe would stay open for as long as any descendant holds it.
    """
    command = [str(part) for part in command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True, **options)
        try:
            process.wait(seconds)
            in_time = True
        except subprocess.TimeoutExpired:
            in_time = False
        finally:
            _end(process)
        for file in (out, err):
            file.seek(0)
        done = subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())
    if not in_time:
        pytest.fail(f"still running after {seconds} s: {shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done


def run_on_terminal(command, environment) -> tuple[int, str]:
    """Its status and what it prints, where that goes to a terminal that has colours."""
    pty = pytest.importorskip("pty")
    terminal, inside = pty.openpty()
    with subprocess.Popen(command, stdout=inside, env=environment | {"TERM": "xterm-256color"}) as process:
        os.close(inside)
        printed = b"".join(iter(lambda: _read(terminal), b""))
    os.close(terminal)
    return process.returncode, printed.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux reports a closed pseudo-terminal so
        return b""


def _end(process):
    """The process, politely if it still runs, and all that is left of its group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
