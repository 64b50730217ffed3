"""The CPU kernels of native.cpp: built once a machine by whatever C++ compiler there is, called through ctypes.

A plain shared library and not a torch extension: it compiles in two seconds instead of a minute and fits every version
of torch. Where there is no compiler nothing fails: `library` says why, and the eager path serves.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mf_scale.kernels.settings import Settings

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
    compiler = _compiler()
    name = f"native-{_fingerprint(compiler)}.so"
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid():
                continue  # somebody else's file would be run
            if not (folder / name).is_file():
                _compile(compiler, folder / name)
            return ctypes.CDLL(str(folder / name))
        except OSError as error:
            reason = f"{folder}: {error.strerror or error}"
    raise NoNativeLibraryError(f"the library cannot be kept anywhere ({reason})")


def mask_loss(
    logits: Tensor,
    segment_map: Tensor,
    segments: Tensor,
    layers: Tensor,
    counts: Tensor,
    settings: Settings,
    *,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Focal and dice loss [B,P] of fp32 logits [B,P,h,w], and the gradient [B,P,h,w] of their weighted sum.

    `segment_map` int16 [B,L,H,W]; `segments`, `layers` int64 [B,P]; `counts` int64 [B]: pairs behind it give zeros.
    """
    logits, segment_map = logits.contiguous(), segment_map.to(torch.int16).contiguous()
    segments, layers, counts = segments.contiguous(), layers.contiguous(), counts.contiguous()
    (B, P, h, w), (L, H, W) = logits.shape, segment_map.shape[1:]
    focal, dice = torch.zeros(B, P), torch.zeros(B, P)
    gradient = torch.zeros_like(logits) if want_gradient else None
    library().mf_mask_loss(
        *map(_address, (logits, segment_map, segments, layers, counts, focal, dice, gradient)),
        *map(ctypes.c_int, (B, P, h, w, L, H, W)),
        *map(ctypes.c_float, settings[:4]),
        ctypes.c_int(settings.exclude),
        ctypes.c_int(torch.get_num_threads()),
    )
    return focal, dice, gradient


class PairSums:
    """Sums over pixels for N queries and T segments of one image, fed a block of pixels at a time."""

    def __init__(self, queries: int, segments: int, alpha: float, gamma: float, exclude: bool) -> None:
        self.queries, self.segments = queries, segments
        self._settings = alpha, gamma, exclude
        self.inside_focal = torch.zeros(segments, queries, dtype=torch.float64)
        """[T,N]: over the segment's pixels, focal term for target 1 minus the one for target 0."""
        self.inside_mass = torch.zeros(segments, queries, dtype=torch.float64)
        """[T,N]: over the segment's pixels, probability."""
        self.outside = torch.zeros(queries, dtype=torch.float64)
        """[N]: over all counted pixels, focal term for target 0."""
        self.mass = torch.zeros(queries, dtype=torch.float64)
        """[N]: over all counted pixels, probability."""

    def add(self, logits: Tensor, maps: Tensor, start: int) -> None:
        """`logits` fp32 [n,N] of pixels start..start+n of `maps`, int16 [L,hw]."""
        alpha, gamma, exclude = self._settings
        logits, maps = logits.contiguous(), maps.contiguous()
        library().mf_pair_sums(
            _address(logits),
            ctypes.c_int(len(logits)),
            ctypes.c_int64(self.queries),
            _address(maps[:, start:]),
            ctypes.c_int64(maps.shape[1]),
            *map(ctypes.c_int, (len(maps), self.segments)),
            *map(ctypes.c_float, (alpha, gamma)),
            ctypes.c_int(exclude),
            *map(_address, (self.inside_focal, self.inside_mass, self.outside, self.mass)),
            ctypes.c_int(torch.get_num_threads()),
        )


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise NoNativeLibraryError("there is no C++ compiler (c++, g++ or clang++)")


def _fingerprint(compiler: str) -> str:
    """Of everything the binary depends on: nodes of a cluster share a home, not a processor."""
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=30, check=False).stdout
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        version, processor = compiler.encode(), platform.processor()
    features = next((line for line in processor.splitlines() if line.startswith(("flags", "Features"))), processor)
    parts = (SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version, features.encode(), platform.machine().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _folders() -> list[Path]:
    """Where the library may be kept: the user's cache, else a folder of the user's own among the temporary files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return [cache / "mf_scale", Path(tempfile.gettempdir()) / f"mf_scale-{os.getuid()}"]


def _compile(compiler: str, target: Path) -> None:
    """Build under another name and rename: ranks that start together each find nothing or a whole file."""
    handle, draft = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [compiler, *_FLAGS, "-o", draft, str(SOURCE)]
        built = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
        if built.returncode:
            raise NoNativeLibraryError(f"{compiler} failed: {' '.join(built.stderr.split())[:300]}")
        Path(draft).replace(target)
    except subprocess.TimeoutExpired as error:
        raise NoNativeLibraryError(f"{compiler} took more than {_COMPILE_SECONDS} s") from error
    finally:
        Path(draft).unlink(missing_ok=True)
