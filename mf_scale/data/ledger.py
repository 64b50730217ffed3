"""Ledger: two numbers that processes of one node share in a small file, under its lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOCK_SECONDS = 5.0
"""Longest wait for the lock: whoever holds it may be stopped, and nobody's reading waits for that."""
LOOK_SECONDS = 0.002


@dataclass
class Entry:
    """What the ledger says."""

    descriptor: int
    held: int | None
    """Bytes that are kept, or reserved by somebody writing; None: nobody knows, the files have to be listed."""
    paused_until: float
    """Time (of time.time) before which nobody stores."""


class Ledger:
    """The file; made when it is first locked."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[Entry | None]:
        """Its entry, alone; None where the lock does not come in time. Raises OSError where there can be no file."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            yield _read(descriptor) if _wait_for(descriptor) else None
        finally:
            os.close(descriptor)

    def write(self, entry: Entry) -> None:
        """Say `entry` from now on; only inside `locked`. One short write, so a kill leaves the one or the other."""
        held = -1 if entry.held is None else entry.held
        os.pwrite(entry.descriptor, f"{held:020d} {entry.paused_until:020.3f}\n".encode(), 0)


def hold(descriptor: int) -> None:
    """Lock an open file until it is closed, which the end of a process does, however it ends."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(path: Path) -> bool:
    """Whether a living process holds the file; False where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> Entry:
    try:
        held, paused_until = os.pread(descriptor, 64, 0).split()
        return Entry(descriptor, int(held) if int(held) >= 0 else None, float(paused_until))
    except ValueError:  # new, or spoilt
        return Entry(descriptor, None, 0.0)


def _wait_for(descriptor: int) -> bool:
    deadline = time.monotonic() + LOCK_SECONDS
    while not _try_lock(descriptor):
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
