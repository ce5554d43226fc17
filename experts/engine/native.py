"""Compiles int8.c for this processor, once, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import platformdirs

from ...errors import ModelUnavailable

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "int8.c"
# Not -ffast-math: sums must keep their order, or the variants of a loop would differ in the last bit; and GCC's start-up code
# for it would make every float operation of the loading thread flush small numbers to zero.
FLAGS = (
    *("-std=gnu11", "-O3", "-shared", "-fPIC", "-pthread", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-signed-zeros", "-ffinite-math-only"),
)
COMPILERS = ("cc", "gcc", "clang")
SECONDS = 300
"""After which a compiler is given up."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. The first call on a machine takes a few seconds, later ones find the file.

    Raises ModelUnavailable where there is no C compiler, or it fails; the message says why.
    """
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise _unavailable("There is no C compiler on the PATH.")
    try:
        command = [compiler, *FLAGS, *_tuning()]
        name = f"int8-{_key(command)}"
        try:
            return _load(_private_folder(), name, command)
        except OSError as error:
            log.warning("The int8 kernels cannot be kept, they are compiled at every start: %s.", error)
        with tempfile.TemporaryDirectory() as folder:
            return _load(Path(folder), name, command)
    except (OSError, subprocess.SubprocessError) as error:
        raise _unavailable(f"The int8 kernels could not be compiled: {_reason(error).rstrip('.')}.") from error


def _private_folder() -> Path:
    """Where compiled kernels are kept. Nobody else may write there: what lies there is run."""
    folder = Path(platformdirs.user_cache_dir("collegium")) / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise PermissionError(f"others can write to {folder}")
    return folder


def _load(folder: Path, name: str, command: Sequence[str]) -> ctypes.CDLL:
    return ctypes.CDLL(str(_find(folder, name) or _compile(folder, name, command)))


def _find(folder: Path, name: str) -> Path | None:
    """What was compiled before, if it is whole. To load half a library may kill the process."""
    return next((path for path in folder.glob(f"{name}-*.so") if path.name == _file_name(path, name)), None)


def _compile(folder: Path, name: str, command: Sequence[str]) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / "int8.so"
        whole = [*command, str(SOURCE), "-o", str(made), "-lm"]
        subprocess.run(whole, capture_output=True, check=True, timeout=SECONDS)  # noqa: S603
        return made.replace(folder / _file_name(made, name))  # whole or not at all, whoever else is compiling


def _file_name(path: Path, name: str) -> str:
    """With the hash of its contents."""
    return f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.so"


def _tuning() -> tuple[str, ...]:
    if platform.machine() in ("x86_64", "AMD64"):
        return "-march=native", "-mprefer-vector-width=512"
    return ("-mcpu=native",)


def _key(command: Sequence[str]) -> str:
    """Names what was compiled: a home may be shared by machines whose processors differ."""
    asked = subprocess.run([command[0], "--version"], capture_output=True, check=False, timeout=SECONDS)  # noqa: S603
    parts = [SOURCE.read_bytes(), " ".join(command).encode(), asked.stdout, _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return next(line for line in lines if line.lower().startswith((b"flags", b"features")))
    except (OSError, StopIteration):
        return platform.processor().encode()


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        words = error.stderr.decode(errors="replace").strip().splitlines()[-3:]
        return " ".join(words) or f"{error.cmd[0]} ended with {error.returncode}"
    return str(error)


def _unavailable(message: str) -> ModelUnavailable:
    return ModelUnavailable(message, hint="Install gcc, or set precision to bfloat16 or float32.")
