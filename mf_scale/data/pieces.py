"""Pieces: stretches of remote shards as local files, shared by all processes of a node and bounded over all of them.

A piece lies in FOLDER/mf_scale-pieces/SHA256-OF-THE-SHARD/NUMBER: its bytes, then a crc32 of each page. The name says
the content: a shard that was packed again has other names, and reading needs no lock. Files are made and get
their name under the ledger's lock; the ledger holds how many bytes there are, so only the store that would pass the
bound looks at the files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mf_scale.data.ledger import Ledger, hold, is_held
from mf_scale.data.pages import file_size, read_pages, with_checksums

PIECE = 4 << 20
"""Bytes of a piece, the unit that is fetched and kept."""
HOME = "mf_scale-pieces"
"""All that the cache owns lies in this folder of the user's; nothing else is ever touched."""
DIGEST = re.compile(r"[0-9a-f]{64}")
PARTIAL = ".partial"
LOW_WATER = 0.9
"""Share of the bound that is kept when room is made, so that files are listed once in a tenth of it."""
PAUSE_SECONDS = 600.0
"""For how long nothing is stored after a fault: by no process where the disk refused, else by the one that met it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheSettings:
    """Where pieces are kept, and how many bytes of files they may be."""

    folder: str
    limit: int


class PieceCache:
    """The pieces of one folder. Faults of the disk are noted once and make it a cache that holds nothing."""

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings
        self.home = Path(settings.folder, HOME)
        self._ledger = Ledger(self.home / "ledger")
        self._paused_until = 0.0
        self._trusted = self._noted = False

    @property
    def storing(self) -> bool:
        """Whether it is worth fetching a whole piece: not where none could be kept."""
        return time.time() >= self._paused_until and self.settings.limit > PIECE

    def load(self, digest: str, number: int, length: int, start: int, stop: int) -> bytes | None:
        """Bytes start..stop of the piece `number` of a shard, `length` bytes long; None where they have to be fetched.

        A piece whose length or checksums are wrong is removed.
        """
        path = self._path(digest, number)
        try:
            if not self._is_ours():
                return None
            with path.open("rb") as file:
                data = read_pages(file.fileno(), length, start, stop, f"{digest}/{number}")
                if data is not None:
                    os.utime(file.fileno())  # the time of its last use, whatever the mount does with access times
                    return data
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            self._note(f"cannot read its files: {error}")
        return None

    def store(self, digest: str, number: int, data: bytes) -> None:
        """Keep a piece and make room for it; where that cannot be done, nothing happens but a note."""
        size = file_size(len(data))
        if not self.storing or size > self.settings.limit:
            return
        path = self._path(digest, number)
        try:
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_ours():
                return
            reserved = self._reserve(path, size)
        except OSError as error:
            self._pause(f"cannot be written: {error}")
            return
        if reserved:
            self._write(reserved, path, with_checksums(data, f"{digest}/{number}"))

    def _path(self, digest: str, number: int) -> Path:
        if not DIGEST.fullmatch(digest):  # it comes from an index, which is untrusted
            raise ValueError(f"{digest!r} is not a sha256")
        return self.home / digest / f"{number:06d}"

    def _is_ours(self) -> bool:
        """Whether nobody else can have put files here; raises FileNotFoundError before the first store."""
        if not self._trusted:
            found = self.home.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                self._pause("is not a folder that only this user can write to", for_good=True)
                return False
            self._trusted = True
        return True

    def _reserve(self, path: Path, size: int) -> tuple[int, Path] | None:
        """An open file, held and counted already; None where the piece is there or nothing is to be stored."""
        with self._ledger.locked() as entry:
            if entry is None:
                self._pause("is busy: its lock was not to be had")
                return None
            if time.time() < entry.paused_until:
                self._paused_until = entry.paused_until
                return None
            if path.exists():
                return None
            if entry.held is None or entry.held + size > self.settings.limit:
                entry.held = self._make_room(size)
            entry.held += size
            self._ledger.write(entry)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}{PARTIAL}")
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            hold(descriptor)  # until this process closes it or dies: so others know whether it is still written
            os.ftruncate(descriptor, size)  # whoever lists the files meanwhile counts it whole
            return descriptor, partial

    def _write(self, reserved: tuple[int, Path], path: Path, content: bytes) -> None:
        descriptor, partial = reserved
        try:
            with os.fdopen(descriptor, "r+b", buffering=0) as file:
                view = memoryview(content)
                while view:
                    view = view[file.write(view) :]
                self._name(partial, path)  # while it is held, so that nobody takes it for a dead writer's
        except OSError as error:
            self._refused(error, partial, len(content))

    def _name(self, partial: Path, path: Path) -> None:
        """Under the lock: whoever lists the files meanwhile could meet neither name and count it as none."""
        with self._ledger.locked() as entry:
            if entry is not None:
                partial.replace(path)
                return
        partial.unlink(missing_ok=True)  # stays counted until the files are listed again
        self._pause("is busy: its lock was not to be had")

    def _refused(self, error: OSError, partial: Path, size: int) -> None:
        """The disk took no more: no process stores for a while, and the first to say so notes it for all."""
        first = True
        with contextlib.suppress(OSError), self._ledger.locked() as entry:
            counted = size if partial.exists() else 0  # whoever made room meanwhile took it for a dead writer's
            partial.unlink(missing_ok=True)
            if entry is not None:
                first = time.time() >= entry.paused_until
                entry.held = None if entry.held is None else max(0, entry.held - counted)
                entry.paused_until = time.time() + PAUSE_SECONDS
                self._ledger.write(entry)
        self._pause(f"cannot be written: {error}", quiet=not first)

    def _make_room(self, size: int) -> int:
        """Remove what dead writers left and, to keep the bound, what was used longest ago; returns the bytes left."""
        found = sorted(self._files(), key=lambda entry: entry[1].st_mtime_ns)
        held, kept = 0, []
        for path, status in found:
            if path.name.endswith(PARTIAL) and not is_held(path):
                path.unlink(missing_ok=True)
                continue
            held += status.st_size
            if not path.name.endswith(PARTIAL):
                kept.append((path, status.st_size))
        if held + size > self.settings.limit:
            for path, length in kept:
                if held + size <= self.settings.limit * LOW_WATER:
                    break
                path.unlink(missing_ok=True)
                held -= length
        for folder in {path.parent for path, _ in found}:
            with contextlib.suppress(OSError):
                folder.rmdir()  # refused unless it is empty
        return held

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder in self.home.iterdir():
            if DIGEST.fullmatch(folder.name) and not folder.is_symlink():
                with os.scandir(folder) as entries:
                    for entry in entries:
                        with contextlib.suppress(FileNotFoundError):  # it went meanwhile
                            yield Path(entry.path), entry.stat(follow_symlinks=False)

    def _pause(self, reason: str, *, quiet: bool = False, for_good: bool = False) -> None:
        self._paused_until = float("inf") if for_good else time.time() + PAUSE_SECONDS
        self._note(f"{reason}; nothing is stored", quiet=quiet)

    def _note(self, text: str, *, quiet: bool = False) -> None:
        if not self._noted and not quiet:
            logger.warning("the cache %s %s, data is read from its source", self.home, text)
        self._noted = True
