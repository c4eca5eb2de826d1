"""The cache of compiled kernels: shared by processes that start at once, and never trusted, needed or in the way.

NVRTC compiles the smallest kernel; where its time or its calls matter, a stub that writes down each call stands in.
"""

import ctypes
import errno
import logging
import multiprocessing
import os
import re
import resource
import signal
import stat
import time
from pathlib import Path

import pytest

from mla_fp8 import jit

ELF_MAGIC = b"\x7fELF"
SMALL, OTHER = "sm90/quantize_q_nope", "sm90/bmm"
PROCESSES = 8
STUB_SECONDS = 0.3  # long enough for every process to ask meanwhile
FILE_LIMIT_BYTES = 4096  # less than any image
KEPT_NOT = "mla_fp8: the compiled kernel cannot be kept: "
HINT = "(each process compiles it again; set XDG_CACHE_HOME to a directory with room that may be written)"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "mla_fp8"


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Stands in for the compiler -> a function that counts its calls, in this process and in those it forks."""
    record = tmp_path / "compiled"
    record.touch()

    def compile_image(_nvrtc, source, _options):
        name = f"{source.parent.name}/{source.stem}"
        with record.open("a") as file:
            file.write(f"{name}\n")
        time.sleep(STUB_SECONDS)
        return image_of(name)

    monkeypatch.setattr(jit, "compile_image", compile_image)
    return lambda: record.read_text().split()


def image_of(name):
    return ELF_MAGIC + name.encode() * FILE_LIMIT_BYTES


def only_file(cache) -> Path:
    (path,) = cache.iterdir()
    return path


def test_jit_first_use_says_what_it_does_in_one_line(cache, compiled, caplog):
    jit.load(SMALL)
    (line,) = caplog.messages
    assert re.fullmatch(
        f"mla_fp8: no embedded kernel runs here: NVRTC compiles {Path(SMALL).name} for sm_90a, one of 4 kernels, "
        f"some seconds each; kept in {re.escape(str(only_file(cache)))}",
        line,
    )
    assert caplog.records[0].levelno == logging.WARNING, "shown unless the user turned it off"


def _load_at_once(barrier, queue, name):
    barrier.wait()
    queue.put(jit.load(name))


def load_at_once(names):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(len(names)), context.Queue()
    processes = [context.Process(target=_load_at_once, args=(barrier, queue, name)) for name in names]
    for process in processes:
        process.start()
    images = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return images


def test_jit_processes_at_once_compile_once(cache, compiled):
    assert set(load_at_once([SMALL] * PROCESSES)) == {image_of(SMALL)}
    assert compiled() == [SMALL]
    assert only_file(cache).suffix == ".cubin", "no temporary file and no lock file is left"


def test_jit_processes_at_once_share_what_nvrtc_made(cache):
    (image,) = set(load_at_once([SMALL] * PROCESSES))
    assert image.startswith(ELF_MAGIC) and only_file(cache).read_bytes().endswith(image)


def test_jit_waits_for_a_process_that_hangs_no_longer_than_it_must(cache, compiled, monkeypatch):
    monkeypatch.setattr(jit, "_PATIENCE_S", 0.2)
    with jit._alone(cache):  # flock is of the open file: another open of this process is another holder
        assert jit.load(SMALL) == image_of(SMALL)
    assert jit.load(SMALL) == image_of(SMALL) and compiled() == [SMALL]


def test_jit_takes_over_from_a_process_that_was_killed(cache, monkeypatch):
    context = multiprocessing.get_context("fork")
    held = context.Event()

    def hold():
        with jit._alone(cache):
            held.set()
            time.sleep(jit._PATIENCE_S)

    process = context.Process(target=hold)
    process.start()
    assert held.wait(30)
    process.kill()
    process.join()
    monkeypatch.setattr(jit.time, "sleep", pytest.fail)  # nothing is left to wait for
    monkeypatch.setattr(jit, "compile_image", lambda *_: image_of(SMALL))
    assert jit.load(SMALL) == image_of(SMALL)


DAMAGES = {
    "empty": lambda whole, image: b"",
    "truncated": lambda whole, image: whole[:-1],
    "half": lambda whole, image: whole[: len(whole) // 2],
    "one_bit": lambda whole, image: whole[:100] + bytes([whole[100] ^ 1]) + whole[101:],
    "longer": lambda whole, image: whole + b"\0",
    "no_digest": lambda whole, image: image,
    "text": lambda whole, image: b"<html>404</html>",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_jit_recovers_from_a_damaged_file(cache, compiled, damage):
    first = jit.load(SMALL)
    path = only_file(cache)
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole, first))
    assert jit.load(SMALL) == first and path.read_bytes() == whole and len(compiled()) == 2


def test_jit_takes_no_whole_file_of_another_kernel(cache, compiled):
    jit.load(SMALL)
    small = only_file(cache)
    jit.load(OTHER)
    (other,) = set(cache.iterdir()) - {small}
    small.write_bytes(other.read_bytes())
    assert jit.load(SMALL) == image_of(SMALL)
    assert compiled() == [SMALL, OTHER, SMALL]


def test_jit_survives_a_directory_in_the_files_place(cache, compiled, caplog):
    jit.load(SMALL)
    path = only_file(cache)
    path.unlink(), path.mkdir()
    assert jit.load(SMALL) == image_of(SMALL)
    assert any(message.startswith(KEPT_NOT) for message in caplog.messages)
    assert only_file(cache) == path, "no temporary file is left"


@pytest.mark.parametrize("step", ["replace", "open"])
def test_jit_full_disk_is_said_and_no_error(cache, compiled, monkeypatch, caplog, step):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_, **__):
        raise full

    owner, call = {"replace": (jit.os, "replace"), "open": (jit.tempfile, "NamedTemporaryFile")}[step]
    monkeypatch.setattr(owner, call, fail)
    assert jit.load(SMALL) == image_of(SMALL)
    assert caplog.messages[-1] == f"{KEPT_NOT}[Errno 28] No space left on device {HINT}"
    assert list(cache.iterdir()) == []


def test_jit_write_that_the_system_cuts_off_leaves_nothing(cache, compiled, caplog):
    """A real short write: files of this process may not grow beyond FILE_LIMIT_BYTES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, hard))
        assert jit.load(SMALL) == image_of(SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caplog.messages[-1].startswith(f"{KEPT_NOT}[Errno {errno.EFBIG}]")
    assert list(cache.iterdir()) == []


def test_jit_keeps_an_image_in_memory_where_the_disk_does_not(cache, compiled, monkeypatch):
    cache.parent.write_text("not a directory")
    monkeypatch.setattr(jit, "_images", {})
    data, size = ctypes.c_void_p(), ctypes.c_size_t()
    error = ctypes.create_string_buffer(64)
    for _ in range(2):
        assert jit._callback(SMALL.encode(), 0, ctypes.byref(data), ctypes.byref(size), error, 64) == 0
        assert ctypes.string_at(data, size.value) == image_of(SMALL)
    assert compiled() == [SMALL]


def test_jit_works_where_the_cache_home_is_a_file(cache, compiled, caplog):
    cache.parent.write_text("not a directory")
    assert jit.load(SMALL) == image_of(SMALL)
    assert caplog.messages[-1].startswith(KEPT_NOT) and caplog.messages[-1].endswith(HINT)


def test_jit_works_where_the_cache_home_is_read_only(cache, compiled, monkeypatch, caplog):
    """Root may write anywhere, so what mkdir says is played here; the directory's mode is what others meet."""
    cache.parent.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    if os.geteuid() == 0:

        def refuse(self, **_):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
    assert jit.load(SMALL) == image_of(SMALL)
    assert caplog.messages[-1] == f"{KEPT_NOT}[Errno 13] Permission denied: '{cache}' {HINT}"


def test_jit_works_for_a_user_without_a_home(compiled, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    reason = "Could not determine home directory."

    def nowhere():
        raise RuntimeError(reason)

    monkeypatch.setattr(Path, "home", nowhere)
    assert jit.load(SMALL) == image_of(SMALL)
    (line,) = caplog.messages
    assert line.endswith(f"kept in memory only ({reason})")


def test_jit_works_where_there_are_no_file_locks(cache, compiled, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(jit.fcntl, "flock", fail)
    assert jit.load(SMALL) == image_of(SMALL)
    assert jit.load(SMALL) == image_of(SMALL) and compiled() == [SMALL]


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_jit_ignores_a_cache_home_that_is_not_absolute(monkeypatch, value):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert jit.cache_directory() == Path.home() / ".cache" / "mla_fp8"
