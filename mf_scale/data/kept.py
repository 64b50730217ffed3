"""Kept: what is worked out once about a large index, by one process for all of the user's.

It lies in the user's own cache and never beside the index, which is untrusted. A file is named by what it was made
of: the index (its digest, and the columns' file as the kernel knows it: a change of its bytes changes its ctime) and
the law. It begins with the sha256 of the rest, so a spoilt one is made again. Where nothing can be kept, everybody
works it out.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol

import numpy as np

from mf_scale.user_cache import is_ours_alone, own_folders

KEPT_FROM = 1 << 20
"""Samples from which on it pays; below, all of it takes a tenth of a second."""
WAIT_SECONDS = 300.0
"""Longest wait for another process that works on the same; a hundred million samples take tens of seconds."""
KEPT_DAYS = 90
"""What nobody has read for so long is removed when something new is kept."""
_LOOK_SECONDS = 0.05
_SUFFIX = ".kept"
_DIGEST = 32
"""Bytes of a sha256."""

logger = logging.getLogger(__name__)


class Source(Protocol):
    """What is asked of an index."""

    samples: int

    @property
    def identity(self) -> tuple[Any, ...]:
        """What changes whenever the bytes of its files do."""


def kept_array(
    source: Source,
    law: tuple[Any, ...],
    make: Callable[[], np.ndarray],
    sound: Callable[[np.ndarray], bool],
) -> np.ndarray:
    """`make()`, int64 [n], of a source and a law (numbers, texts, arrays): read where it is kept and `sound`."""
    folder = next(own_folders(), None) if source.samples >= KEPT_FROM else None
    if folder is None:
        return make()
    path = folder / f"index-{_name((source.identity, law))}{_SUFFIX}"
    found = _read(path, sound)
    if found is not None:
        return found
    with _alone(path.with_suffix(".lock")):
        found = _read(path, sound)
        if found is None:
            found = make()
            _write(path, found)
    return found


def _name(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in _leaves(parts):
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:32]


def _leaves(parts: Any) -> Iterator[Any]:
    for part in parts:
        if isinstance(part, tuple):
            yield from _leaves(part)
        else:
            yield part


def _read(path: Path, sound: Callable[[np.ndarray], bool]) -> np.ndarray | None:
    """None where there is nothing, or nothing that can be trusted."""
    try:
        if not is_ours_alone(path, S_ISREG):
            return None
        data = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    if len(data) % 8 or hashlib.sha256(memoryview(data)[_DIGEST:]).digest() != data[:_DIGEST]:
        return None
    found = np.frombuffer(data, np.int64, offset=_DIGEST)
    return found if sound(found) else None


def _write(path: Path, found: np.ndarray) -> None:
    """Under another name, then renamed: whoever reads finds nothing or all. A disk that refuses is no fault."""
    payload = np.ascontiguousarray(found, np.int64).data
    try:
        _forget_old(path.parent)
        handle, draft = tempfile.mkstemp(suffix=".draft", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(payload).digest())
                file.write(payload)
            Path(draft).replace(path)
        finally:
            Path(draft).unlink(missing_ok=True)
    except OSError as error:
        logger.info("what was worked out of the index is not kept: %s", error)


def _forget_old(folder: Path) -> None:
    for path in folder.glob(f"index-*{_SUFFIX}"):
        if path.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Alone among the processes that see the lock; without it where it cannot be had in time or at all."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield
        return
    try:
        _wait_for(descriptor)
        yield
    finally:
        # Whoever waits holds the same file, whoever comes now finds what was kept: nobody is misled.
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _wait_for(descriptor: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOOK_SECONDS)
        except OSError:  # a file system without locks
            return
        else:
            return
