"""The library of native.cpp: built once a machine by whatever C++ compiler there is.

A plain shared library and not a torch extension: it compiles in two seconds instead of a minute and fits every version
of torch. Where there is no compiler nothing fails: `library` says why, and the eager path serves.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from mf_scale.user_cache import cache_folders, is_ours_alone

SOURCE = Path(__file__).with_name("native.cpp")
# Sums inside a row may be reordered (omp simd), nothing else is loosened: infinities and NaN keep their meaning.
_EXACT_BUT_FAST = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", *_EXACT_BUT_FAST]
_COMPILE_SECONDS = 120


class NoNativeLibraryError(Exception):
    """Why there is no native library on this machine, in one line."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library, from the user's cache folder or built into it; raises NoNativeLibraryError."""
    compilers, reasons = _compilers(), []
    for compiler in compilers:
        name = f"native-{_fingerprint(compiler)}.so"
        try:
            return _kept(compiler, name)
        except NoNativeLibraryError as error:
            reasons.append(str(error))
    raise NoNativeLibraryError("; ".join(dict.fromkeys(reasons)) or "there is no C++ compiler (c++, g++ or clang++)")


def _kept(compiler: list[str], name: str) -> ctypes.CDLL:
    """The library in the first folder that can keep it; raises NoNativeLibraryError for the compiler or all folders."""
    reasons = []
    for folder in cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not is_ours_alone(folder, stat.S_ISDIR):
                reasons.append(f"{folder}: others own it or may write to it, or it is a link")
                continue  # somebody else's file would be run
            if not (folder / name).exists() or not is_ours_alone(folder / name, stat.S_ISREG):
                _compile(compiler, folder / name)
            return _load(folder / name)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
    raise NoNativeLibraryError(f"the library cannot be kept anywhere ({', '.join(reasons)})")


def _load(path: Path) -> ctypes.CDLL:
    """Raises OSError for what is no library."""
    loaded = ctypes.CDLL(str(path))
    for function in (loaded.mf_mask_loss, loaded.mf_pair_sums):
        function.restype = ctypes.c_int
    return loaded


def _compilers() -> list[list[str]]:
    """Commands to try, CXX first: it may carry arguments (ccache g++) and may be one for another machine."""
    try:
        wanted = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # a quote without its end
        wanted = []
    commands = [words for words in (wanted, ["c++"], ["g++"], ["clang++"]) if words]
    return [[found, *words[1:]] for words in commands if (found := shutil.which(words[0]))]


def _fingerprint(compiler: list[str]) -> str:
    """Of everything the binary depends on: nodes of a cluster share a home, not a processor."""
    version, processor = b"", platform.processor()
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=30, check=False).stdout
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        pass
    features = next((line for line in processor.splitlines() if line.startswith(("flags", "Features"))), processor)
    texts = (*_FLAGS, *compiler, features, platform.machine())
    parts = (SOURCE.read_bytes(), version, *(text.encode(errors="replace") for text in texts))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _compile(compiler: list[str], target: Path) -> None:
    """Build under another name and rename: ranks that start together each find nothing or a whole file."""
    handle, draft = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        _run([*compiler, *_FLAGS, "-o", draft, str(SOURCE)], compiler)
        Path(draft).chmod(0o700)  # whatever the umask: `is_ours_alone` must hold
        Path(draft).replace(target)
    finally:
        Path(draft).unlink(missing_ok=True)


def _run(command: list[str], compiler: list[str]) -> None:
    """Raises NoNativeLibraryError when the compiler cannot be run, fails or does not end."""
    shown = shlex.join(compiler)
    try:
        built = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NoNativeLibraryError(f"{shown} took more than {_COMPILE_SECONDS} s") from error
    except OSError as error:
        raise NoNativeLibraryError(f"{shown} cannot be run: {error.strerror or error}") from error
    if built.returncode:
        raise NoNativeLibraryError(f"{shown} failed: {' '.join(built.stderr.split())[:300]}")
