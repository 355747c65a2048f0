"""Optional C++ forms of operations: built by the machine's compiler on first request, loaded through ctypes.

A source is one file of plain C functions without a header of torch, so that a build takes seconds and needs
neither ninja nor setuptools, and a built library serves any version of torch. It is kept in torch's folder of
extensions (TORCH_EXTENSIONS_DIR, else the user's cache) under a hash of the source, the compiler and the
instruction set, and serves every later process. Nothing needs a compiler; without one `refusal` says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .tracing import constant_result

_LOG = logging.getLogger("seqzoo")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
# The first that the compiler accepts: without OpenMP a form runs on one thread, without "native" slower.
TUNING = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
SECONDS = 180  # for one run of the compiler

_LOADED: dict[Path, ctypes.CDLL] = {}
_FAILED: dict[Path, str] = {}


def compiler() -> str | None:
    """The path of the C++ compiler: $CXX, else c++, g++ or clang++; None where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


@constant_result
def refusal(source: Path) -> str | None:
    """Why the form in this source cannot run here, or None; cheap, nothing is built."""
    if source in _LOADED:
        return None
    if source in _FAILED:
        return _FAILED[source]
    if sys.platform == "win32":
        return "is compiled on Linux and macOS only"
    if compiler() is None:
        return "has no C++ compiler here (c++, g++ or clang++, or the one in $CXX)"
    return None


def library(source: Path) -> ctypes.CDLL:
    """The library of a source, built if no earlier process did.

    Raises RuntimeError where `refusal` has a reason, and when the build fails, with the compiler's message.
    """
    if source not in _LOADED:
        reason = refusal(source)
        if reason is not None:
            raise RuntimeError(f"{source.name} {reason}")
        try:
            _LOADED[source] = ctypes.CDLL(str(build(source)))
        except (OSError, RuntimeError) as error:
            _FAILED[source] = f"could not be built: {error}"
            raise RuntimeError(f"{source.name} {_FAILED[source]}") from error
    return _LOADED[source]


def cache_folder() -> Path:
    """torch's folder of extensions, for this user."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "torch_extensions"


def build(source: Path) -> Path:
    """The shared library of a source in the cache; one process compiles it if need be, others wait."""
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler")
    key = hashlib.sha256(source.read_bytes() + repr((FLAGS, TUNING)).encode() + _target(command))
    name = f"seqzoo_{source.parent.name}_{key.hexdigest()[:16]}"
    folder = cache_folder() / name
    target = folder / f"{name}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if not target.exists():
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / target.name
                _compile(command, source, made)
                made.replace(target)  # all at once: no process ever sees half a library
            _LOG.info("built %s in %.1f s", target, time.perf_counter() - start)
    return target


def _target(command: str) -> bytes:
    """What a library depends on besides its source: the compiler's version and instruction set, as its macros."""
    for tuning in (("-march=native",), ()):
        done = _run([command, *tuning, "-dM", "-E", "-x", "c++", os.devnull])
        if done.returncode == 0:
            return command.encode() + done.stdout
    return command.encode()


def _compile(command: str, source: Path, target: Path) -> None:
    messages = []
    for tuning in TUNING:
        done = _run([command, *FLAGS, *tuning, str(source), "-o", str(target)])
        if done.returncode == 0:
            return
        messages.append(done.stderr.decode(errors="replace").strip())
    raise RuntimeError(f"{command} says: {messages[-1][-1000:]}")


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]}: {error}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that dies."""
    import fcntl  # not on Windows, which `refusal` sends away

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
