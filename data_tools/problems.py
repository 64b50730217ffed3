"""Problems: findings gathered by kind and told at once, with counts and a few names; faults of the disk."""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from mf_scale.errors import FaultError, UserError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {errno.EACCES, errno.EROFS, errno.EPERM}
SURROUNDINGS = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOTCONN,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ESHUTDOWN, errno.EAGAIN,
}  # fmt: skip
"""What a network file system says while a server of it restarts, or a disk that fails: nobody's mistake."""
NAMED = 3
"""Names given of each kind."""


class Problems:
    """Findings by kind."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, name: str) -> None:
        self.found[kind].append(name)

    def take(self, other: Problems) -> None:
        """Those of a part of the work."""
        for kind, names in other.found.items():
            self.found[kind] += names

    def __len__(self) -> int:
        return sum(map(len, self.found.values()))

    def lines(self) -> list[str]:
        """One line a kind: the kind, how often, the first names."""
        return [
            f"{kind}: {len(names)} ({', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''})"
            for kind, names in self.found.items()
        ]

    def error(self, what: str, *, where: str, remedy: str) -> UserError:
        """All findings in one paragraph."""
        return UserError(f"{what}: {'; '.join(self.lines())}", where=where, remedy=remedy)

    def refuse(self, what: str, *, where: str, remedy: str) -> None:
        """Raise the error, if anything was found."""
        if self.found:
            raise self.error(what, where=where, remedy=remedy)


class disk_faults:  # noqa: N801 - used as a context manager
    """Turns every OSError into a UserError that names the path: a full disk, no permission, no such folder, ...

    A fault of the surroundings becomes a FaultError.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        """Named where the error itself does not know its path."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, OSError):
            return
        known = "" if self.path is None else str(self.path)
        where = known if error.filename is None else os.fsdecode(error.filename)
        fault = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
        if error.errno in NO_ROOM:
            raise UserError(
                f"nothing more can be written: {fault}",
                where=known or where,
                remedy="Make room and run the same command again; finished shards are kept.",
            ) from error
        if error.errno in SURROUNDINGS:
            raise FaultError(
                f"the file system failed: {fault}",
                where=where,
                remedy="Check the file system (its servers, the network, the disk); the same command goes on.",
            ) from error
        if error.errno in NOT_ALLOWED:
            what, remedy = "this cannot be read or written", "Check its permissions."
        else:
            what, remedy = "this path cannot be used", "Check that it is spelt right and is what the command takes."
        raise UserError(f"{what}: {fault}", where=where, remedy=remedy) from error
