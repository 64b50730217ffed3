"""Locks on files that die with their holder, where the file system has them."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK})


def try_lock(handle: int) -> bool | None:
    """True: locked now; False: another process has it locked; None: the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise  # a server that stumbles is not one without locks: who took it so would push a live holder aside
    return True


def leads_to(path: Path, handle: int) -> bool:
    """Whether the path still leads to the file: who held it before may have renamed or removed it meanwhile."""
    try:
        there, here = path.stat(), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
