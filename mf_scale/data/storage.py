"""Storage: ranged reads of a source, local or remote, retried in place. No url ever reaches a shell."""

from __future__ import annotations

import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

from mf_scale.config.urls import redact, scheme_of
from mf_scale.data.refusals import PLACE, refusal
from mf_scale.data.remote import Remote, open_remote
from mf_scale.errors import FaultError, UserError

MISSING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What no retry mends of a local file."""
ATTEMPTS = 9
"""Tries of one read before the run stops; one that delivers a part of the bytes begins anew."""
FIRST_WAIT = 0.25
LONGEST_WAIT = 30.0
"""Seconds before the second try, doubled for each further one up to the longest: about a minute in all."""
MOST_AT_ONCE = 64 << 20
"""Bytes asked for in one go: Python makes room for them before it knows that the file has them."""
LONGEST_SAYING = 300
"""Characters of a fault that are told: some libraries put what they received into it."""
OPEN_FILES = 32
"""Local shards kept open."""

Result = TypeVar("Result")


class StorageError(FaultError):
    """A read failed for good although it was retried: a fault of the network or disk, not of the data or the user."""


def plain_name(name: str) -> str:
    """The name of a file directly inside a source; raises UserError for a path, `..` or a hidden name."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=,@-]*", name):
        raise UserError(
            f"the index names a file {name!r}, which is not a plain file name",
            remedy="An index only names files that lie beside it.",
        )
    return name


class Storage:
    """The files of one source. Picklable, and safe to use in a forked process."""

    def __init__(self, source: str) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()
        self.scheme = scheme_of(source)
        self.source = self.scheme + source[len(self.scheme) :].rstrip("/") or "/"
        self._remote: tuple[int, Any] = (-1, None)
        self._before_fork: list[Any] = []

    def __reduce__(self) -> tuple[type[Storage], tuple[Any, ...]]:
        return Storage, (self.source,)

    def __del__(self) -> None:
        self.close()

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes of file `name` from `offset`.

        Raises UserError where the file is missing or too short, StorageError where retries are exhausted.
        """
        data = bytearray()
        while len(data) < size:
            at = offset + len(data)
            wanted = min(size - len(data), MOST_AT_ONCE)
            piece = self._attempt(name, f"at byte {at}", partial(self._read_some, name, at, wanted))
            if not piece:
                raise UserError(
                    f"{name} ends at byte {at}, its index says it goes on",
                    where=self.source,
                    remedy="It was cut or replaced: restore it, or pack (or index) the source again.",
                )
            data += piece
        return bytes(data)

    def size(self, name: str) -> int:
        """Size of a file in bytes; raises as `read`."""
        return self._attempt(name, "for its size", partial(self._find_size, name))

    def read_all(self, name: str) -> bytes:
        """The whole file."""
        return self.read(name, 0, self.size(name))

    def local_path(self, name: str) -> Path | None:
        """Path of a file of a local source; None for a remote one."""
        return None if self.scheme else Path(self.source, self._checked(name))

    def close(self) -> None:
        """Close the local shards that are kept open; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _attempt(self, name: str, part: str, act: Callable[[], Result]) -> Result:
        """`act()`, tried again after faults that may pass; `part` says which read of the file it is."""
        failures = 0
        while True:
            try:
                return act()
            except UserError:
                raise
            except Exception as error:  # a remote file system raises what it likes
                if found := self._refusal(error):
                    reason, remedy = found
                    raise UserError(f"{name} cannot be read: {reason}", where=self.source, remedy=remedy) from error
                if not self.scheme and not isinstance(error, OSError):
                    raise
                failures += 1
                self._wait(name, part, failures, error)

    def _refusal(self, error: Exception) -> tuple[str, str] | None:
        if self.scheme:
            return refusal(error, self.scheme)
        return (type(error).__name__, PLACE) if isinstance(error, MISSING) else None

    def _find_size(self, name: str) -> int:
        if not self.scheme:
            return Path(self.source, self._checked(name)).stat().st_size
        size = self._files().size(self._url(name))
        if size is None:
            raise UserError(
                "the server does not tell the size of files",
                where=self._url(name),
                remedy="Use a server or store that answers range requests, or a local copy.",
            )
        return size

    def _read_some(self, name: str, offset: int, size: int) -> bytes:
        if self.scheme:
            return self._files().read(self._url(name), offset, size)
        return os.pread(self._descriptor(name), size, offset)

    def _wait(self, name: str, part: str, failures: int, error: Exception) -> None:
        """Before the next try; StorageError once the tries are used up."""
        if failures >= ATTEMPTS:
            said = shorten(redact(f"{type(error).__name__} {error}"), LONGEST_SAYING, placeholder=" …")
            raise StorageError(
                f"reading {name} {part} failed {ATTEMPTS} times, the last time with {said}",
                where=self.source,
                remedy="Check the network and the server or disk that holds it, then run the same command again.",
            ) from error
        self.close()  # a stale handle of a network file system stays stale
        time.sleep(min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT))

    def _descriptor(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        if len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[name] = os.open(Path(self.source, self._checked(name)), os.O_RDONLY | os.O_CLOEXEC)
        return self._open[name]

    def _files(self) -> Remote:
        """The remote files as this process has them; those made before a fork have threads that did not come along."""
        owner, remote = self._remote
        if owner != os.getpid():
            self._before_fork.append(remote)  # dropped here they would be closed, and wait for those threads
            remote = open_remote(self.scheme, self.source)
            self._remote = os.getpid(), remote
        return remote

    def _checked(self, name: str) -> str:
        """The name of a file that may be asked for: an index is untrusted."""
        return plain_name(name)

    def _url(self, name: str) -> str:
        return f"{self.source}/{self._checked(name)}"
