"""Storage: ranged reads of a source, local or remote, retried in place. No url ever reaches a shell."""

from __future__ import annotations

import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mf_scale.errors import FaultError, UserError

EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gcs"}
"""Schemes read through fsspec, and the extra that installs what fsspec needs for each."""
MISSING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What no retry mends; a remote FileNotFoundError only where the server said so."""
PIECE = 4 << 20
"""Bytes of one remote request: after a fault, reading goes on at the piece that broke."""
ATTEMPTS = 9
"""Tries of one read before the run stops."""
FIRST_WAIT = 0.25
LONGEST_WAIT = 30.0
"""Seconds before the second try, doubled for each further one up to the longest: about a minute in all."""
OPEN_FILES = 32
"""Local shards kept open."""

Result = TypeVar("Result")


class StorageError(FaultError):
    """A read failed for good although it was retried: a fault of the network or disk, not of the data or the user."""


def scheme_of(source: str) -> str:
    """Scheme of a source: one of EXTRAS, or "" for a local folder. Raises UserError for everything else."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", source)
    if not found:
        return ""
    scheme = found[1].lower()
    if scheme in EXTRAS and source[found.end() :].startswith("//"):
        return scheme
    raise UserError(
        f"sources of the kind {scheme + ':'!r} are not read",
        where=source,
        remedy=f"Give a local folder (./{source} if it is one) or a url of {', '.join(EXTRAS)}.",
    )


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
        self._files: OrderedDict[str, int] = OrderedDict()
        self.source = source.rstrip("/") or "/"
        self.scheme = scheme_of(source)
        self._remote: tuple[int, Any] = (-1, None)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
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
            piece = self._attempt(name, f"at byte {at}", partial(self._read_some, name, at, size - len(data)))
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
        return None if self.scheme else Path(self.source, plain_name(name))

    def close(self) -> None:
        """Close the local shards that are kept open; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _attempt(self, name: str, part: str, act: Callable[[], Result]) -> Result:
        """`act()`, tried again after faults that may pass; `part` says which read of the file it is."""
        failures = 0
        while True:
            try:
                return act()
            except UserError:
                raise
            except Exception as error:  # a remote file system raises what it likes
                if isinstance(error, MISSING) and not (self.scheme and _only_unreachable(error)):
                    raise self._missing(name, error) from error
                if not self.scheme and not isinstance(error, OSError):
                    raise
                failures += 1
                self._wait(name, part, failures, error)

    def _find_size(self, name: str) -> int:
        if self.scheme:
            size = self._filesystem().size(self._url(name))
            if size is None:
                raise UserError(
                    "the server does not tell the size of files",
                    where=self._url(name),
                    remedy="Use a server or store that sends Content-Length, or a local copy.",
                )
            return int(size)
        return Path(self.source, plain_name(name)).stat().st_size

    def _read_some(self, name: str, offset: int, size: int) -> bytes:
        if self.scheme:
            wanted = min(size, PIECE)
            data: bytes = self._filesystem().cat_file(self._url(name), start=offset, end=offset + wanted)
            if len(data) > wanted:
                raise UserError(
                    "the server sends whole files instead of ranges",
                    where=self._url(name),
                    remedy="Use a server or store that answers range requests, or a local copy.",
                )
            return data
        return os.pread(self._descriptor(name), size, offset)

    def _wait(self, name: str, part: str, failures: int, error: Exception) -> None:
        """Before the next try; StorageError once the tries are used up."""
        if failures >= ATTEMPTS:
            fault = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            said = " ".join(f"{type(fault).__name__} {fault}".split())
            raise StorageError(
                f"reading {name} {part} failed {ATTEMPTS} times, the last time with {said}",
                where=self.source,
                remedy="Check the network and the server or disk that holds it, then run the same command again.",
            ) from error
        self.close()  # a stale handle of a network file system stays stale
        time.sleep(min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT))

    def _descriptor(self, name: str) -> int:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        if len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[name] = os.open(Path(self.source, plain_name(name)), os.O_RDONLY | os.O_CLOEXEC)
        return self._files[name]

    def _filesystem(self) -> Any:
        """The fsspec file system of this process; one made before a fork has threads that did not come along."""
        owner, remote = self._remote
        if owner != os.getpid():
            import fsspec

            try:
                remote = fsspec.filesystem(self.scheme, skip_instance_cache=True)
            except ImportError as error:
                raise UserError(
                    f"reading {self.scheme} needs a package that is not installed: {error}",
                    where=self.source,
                    remedy=f"pip install 'mf_scale[{EXTRAS[self.scheme]}]'",
                ) from error
            self._remote = os.getpid(), remote
        return remote

    def _url(self, name: str) -> str:
        return f"{self.source}/{plain_name(name)}"

    def _missing(self, name: str, error: Exception) -> UserError:
        return UserError(
            f"{name} cannot be read: {type(error).__name__}",
            where=self.source,
            remedy="Check that the source is complete and readable (python -m data_tools verify).",
        )


def _only_unreachable(error: BaseException) -> bool:
    """True for a FileNotFoundError that fsspec made of another fault, such as a refused connection.

    fsspec's http does so in `size`; where the server itself answered 404 there is no cause, or it holds the status.
    """
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None or isinstance(cause, FileNotFoundError):
        return False
    response = getattr(cause, "response", None)  # of boto
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    return 404 not in (getattr(cause, "status", None), metadata.get("HTTPStatusCode"))
