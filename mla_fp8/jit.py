"""Compiles kernels through NVRTC where none were embedded at build time, and keeps them in a cache on disk.

The library asks for an image at an op's first use on a GPU. Nothing here imports CUDA before that.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mla_fp8 import devices

__all__ = ["warm_up"]

_DIGEST_BYTES = hashlib.sha256().digest_size  # a cached file is the digest of its name and image, then the image
_PATIENCE_S = 120.0  # with another process that compiles; then this one does so too
_POLL_S = 0.05
# mla_fp8_image_loader of csrc/gpu/exports.h: image name, device index, data, size, error, error's size -> 0: found
_LOADER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p),
                           ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_char), ctypes.c_size_t)  # fmt: skip
_ERROR_BYTES = 8192

_log = logging.getLogger("mla_fp8")
_lock = threading.Lock()
_images: dict[str, Any] = {}  # what the driver was given must stay where it is
_library: ctypes.CDLL  # from `register` on, which importing mla_fp8 calls


def source_directory() -> Path:
    """The kernels' sources: installed beside this file, or the checkout's in an editable install."""
    here = Path(__file__).resolve().parent
    for directory in (here / "csrc", here.parent / "csrc"):
        if (directory / "kernels").is_dir():
            return directory
    raise FileNotFoundError(f"the kernels' sources must be in {here / 'csrc'}, got nothing there: reinstall mla_fp8")


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/mla_fp8, by default ~/.cache/mla_fp8. Raises RuntimeError for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "mla_fp8"


def load(name: str) -> bytes:
    """The image of csrc/kernels/<name>.cu, from the cache or compiled now: by one of the processes that ask."""
    nvrtc = _import_nvrtc()
    sources = source_directory()
    source = sources / "kernels" / f"{name}.cu"
    arguments = nvrtc, source, [*_options(name), f"--include-path={sources}"]
    try:
        path = _cached_path(nvrtc, name)
    except RuntimeError as e:  # of Path.home()
        _announce(source, f"memory only ({e})")
        return compile_image(*arguments)
    image = _read(path)
    if image is None:
        with _alone(path.parent):
            image = _read(path)  # another process may have made it meanwhile
            if image is None:
                _announce(source, str(path))
                image = compile_image(*arguments)
                _write(path, image)
    return image


def cached_image(name: str) -> Path | None:
    """The file that `load` would take instead of compiling, or None. Raises RuntimeError where there is no NVRTC."""
    path = _cached_path(_import_nvrtc(), name)
    return path if _read(path) is not None else None


def _announce(source: Path, where: str) -> None:
    target, kernels = devices.TARGETS[source.parent.name], len(list(source.parent.glob("*.cu")))
    what = f"NVRTC compiles {source.stem} for {target}, one of {kernels} kernels, some seconds each"
    _log.warning("mla_fp8: no embedded kernel runs here: %s; kept in %s", what, where)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process at a time, where the file system can say so; a holder's end, of any kind, ends its turn."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        yield  # _write will say what is wrong
        return
    try:
        end = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_POLL_S)
            except OSError:  # no locks here
                break
        yield
    finally:
        os.close(handle)


def compile_image(nvrtc: Any, source: Path, options: list[str]) -> bytes:
    """One .cu file -> cubin. Raises RuntimeError with the compiler's log."""
    code = source.read_bytes()
    program = _check(nvrtc, *nvrtc.nvrtcCreateProgram(code, source.name.encode(), 0, [], []))
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_check(nvrtc, *nvrtc.nvrtcGetProgramLogSize(program)))
            _check(nvrtc, *nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"NVRTC could not compile {source}: {log.decode(errors='replace').rstrip(chr(0))}")
        image = bytearray(_check(nvrtc, *nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc, *nvrtc.nvrtcGetCUBIN(program, image))
        return bytes(image)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def warm_up(device_index: int = 0) -> None:
    """Load every kernel onto a GPU, compiling where needed, so that a CUDA graph capture may begin with any op.

    Args:
        device_index: of torch's devices, as in cuda:0.

    Returns: nothing.
    Raises: RuntimeError for no CUDA driver or one older than 12.0, a device index or compute capability that is not
        supported, no NVRTC where it is needed, or sources that it does not compile.
    Notes: launches nothing; waits for NVRTC, some seconds a kernel, unless `cache_directory()` has its work. Not needed
        where the driver takes embedded kernels: `python -m mla_fp8 info`.
    Example:
        >>> warm_up() if torch.cuda.is_available() else None
    """
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    if _library.mla_fp8_warm_up(ctypes.c_int(device_index), error, ctypes.c_size_t(_ERROR_BYTES)) != 0:
        raise RuntimeError(error.value.decode(errors="replace"))


def embedded_refusal(device_index: int = 0) -> str:
    """Empty where a GPU runs the embedded kernels, which are loaded then; else why not. Compiles nothing."""
    _library.mla_fp8_set_image_loader(None)
    try:
        warm_up(device_index)
    except RuntimeError as error:
        return str(error)
    finally:
        _library.mla_fp8_set_image_loader(_callback)
    return ""


def register(library: ctypes.CDLL) -> None:
    """Let the op library, which is loaded already, ask this module for images."""
    global _library
    _library = library
    _library.mla_fp8_set_image_loader(_callback)


def _load_into(name: bytes, device_index: int, data: Any, size: Any, error: Any, error_size: int) -> int:
    key = name.decode()
    try:
        with _lock:  # threads that need the same image wait for the first
            if key not in _images:
                image = load(key)
                _images[key] = ctypes.create_string_buffer(image, len(image))
        data[0] = ctypes.addressof(_images[key])
        size[0] = len(_images[key])
        return 0
    except BaseException as e:  # nothing may leave a C callback
        message = f"{type(e).__name__}: {e}".encode()[: error_size - 1] + b"\0"
        ctypes.memmove(error, message, len(message))
        return 1


_callback = _LOADER(_load_into)  # alive as long as the library may call it


def _import_nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # finds libnvrtc
        return nvrtc
    except (ImportError, RuntimeError, OSError) as e:
        raise RuntimeError(
            "NVRTC must be there to compile kernels, where none are embedded or the driver refuses them: run "
            f"`pip install mla_fp8[cuda] nvidia-cuda-nvrtc`, or build with nvcc on the PATH, which embeds them ({e})"
        ) from e


def _check(nvrtc: Any, result: Any, value: Any = None) -> Any:
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC failed: {result.name}")
    return value


def _cached_path(nvrtc: Any, name: str) -> Path:
    return cache_directory() / f"{name.replace('/', '-')}-{_key(nvrtc, source_directory(), _options(name))}.cubin"


def _options(name: str) -> list[str]:
    target = devices.TARGETS[name.split("/")[0]]
    return [f"--gpu-architecture={target}", "--std=c++17", "--device-as-default-execution-space"]


def _key(nvrtc: Any, sources: Path, options: list[str]) -> str:
    """Changes with any source, option or compiler."""
    digest = hashlib.sha256(repr((nvrtc.nvrtcVersion()[1:], options)).encode())
    for path in sorted([*sources.glob("*.h"), *sources.glob("kernels/**/*")]):
        if path.is_file():
            digest.update(f"{path.relative_to(sources).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, image = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return image if _digest(path, image) == digest else None


def _digest(path: Path, image: bytes) -> bytes:
    """Of the name too: a whole file that came from elsewhere under this name is not taken."""
    return hashlib.sha256(path.name.encode() + b"\0" + image).digest()


def _write(path: Path, image: bytes) -> None:
    """Readers see the old file or the whole new one. Without a cache the next process only takes longer."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(_digest(path, image) + image)
        os.replace(temporary, path)
    except OSError as e:
        hint = "each process compiles it again; set XDG_CACHE_HOME to a directory with room that may be written"
        _log.warning("mla_fp8: the compiled kernel cannot be kept: %s (%s)", e, hint)
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink(missing_ok=True)
