"""Who makes a part: the process that holds the lock on .part-000000.lock, from before its first image to its commit.

The lock goes with its process, however that ends. Where the file system has no locks several processes may make one
part: each under names of its own, and they come to the same bytes.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

from mf_scale.errors import UserError
from mf_scale.evaluation.prediction.commits import is_committed, part_name
from mf_scale.evaluation.prediction.plan import host_mark, mark
from mf_scale.file_locks import leads_to, try_lock
from mf_scale.rundir import disk_errors

LOCK = "lock"
OLD_SECONDS = 86_400.0
"""Age of another host's temporary file from which on its writer counts as dead: it grows with every image."""
_UNLOCKED = -1
"""Instead of a handle, where the file system has no locks."""
_WRITER = re.compile(r"\.([A-Za-z0-9-]+)\.(\d+)\.(\d+)$")


class Claims:
    """The parts that are this process's to make now. Safe for several threads."""

    def __init__(self, books: Path, layout: str) -> None:
        self._books, self._layout = books, layout
        self._handles: dict[int, int] = {}
        self._guard, self._closed = threading.Lock(), False
        with disk_errors(books):
            books.mkdir(parents=True, exist_ok=True)

    def take(self, part: int) -> bool:
        """Claim a part; False where it is done, or another process holds it."""
        if is_committed(self._books, self._layout, part):
            return False
        with self._guard:
            if self._closed:
                return False
            with disk_errors(self._books):
                handle = _locked(_lock_of(self._books, part))
            if handle is None:
                return False
            self._handles[part] = handle
        if not is_committed(self._books, self._layout, part):
            return True
        self.release(part)  # committed between the look and the lock
        return False

    def alone(self, part: int) -> bool:
        """True where the lock says that nobody else makes this part."""
        return self._handles.get(part, _UNLOCKED) != _UNLOCKED

    def release(self, part: int) -> None:
        """Let go of a part."""
        with self._guard:
            self._let_go(part)

    def close(self) -> None:
        """Let go of all parts, and take none any more."""
        with self._guard:
            self._closed = True
            for part in list(self._handles):
                self._let_go(part)

    def clean(self, part: int) -> None:
        """Remove what others began of a claimed part and will not end."""
        for left in self._books.glob(f".{part_name(part, '*')}"):
            if left != _lock_of(self._books, part) and (self.alone(part) or _is_left(left)):
                left.unlink(missing_ok=True)

    def _let_go(self, part: int) -> None:
        handle = self._handles.pop(part, _UNLOCKED)
        if handle == _UNLOCKED:
            return
        with suppress(OSError):  # while it is held: who waits for the name finds that it leads elsewhere
            _lock_of(self._books, part).unlink(missing_ok=True)
        os.close(handle)


def writer_mark() -> str:
    """What the temporary files of a part end in: host, process and its start, as process ids come again."""
    return f"{mark()}.{_start_of(os.getpid()) or 0}"


def refuse_held(books: Path) -> None:
    """UserError where a process is at work on a part in this folder."""
    for lock in books.glob(f".part-*.{LOCK}") if books.is_dir() else ():
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            free = try_lock(handle)
        finally:
            os.close(handle)
        if free is False:
            raise UserError(
                "another process is predicting into this folder",
                where=str(books),
                remedy="Stop it or wait for it, or choose another folder.",
            )


def sweep(books: Path) -> None:
    """Remove the lock files of killed processes, once every part is committed and none is to be held any more."""
    for lock in books.glob(f".part-*.{LOCK}"):
        lock.unlink(missing_ok=True)


def _lock_of(books: Path, part: int) -> Path:
    return books / f".{part_name(part, LOCK)}"


def _locked(place: Path) -> int | None:
    """A handle with the lock on, _UNLOCKED where there are no locks; None: another process holds it."""
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            free = try_lock(handle)
            if free and leads_to(place, handle):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if free is None:
            place.unlink(missing_ok=True)
            return _UNLOCKED
        if not free:
            return None


def _is_left(file: Path) -> bool:
    """Whether the writer of a temporary file is dead, as far as this host can tell."""
    writer = _WRITER.search(file.name)
    try:
        if writer and writer[1] == host_mark():
            return _start_of(int(writer[2])) != int(writer[3])
        return time.time() - file.stat().st_mtime > OLD_SECONDS
    except FileNotFoundError:
        return False


def _start_of(pid: int) -> int | None:
    """When a process of this host began, in the kernel's ticks; None where there is none."""
    try:
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, ValueError, IndexError):
        return None
