"""Whether a run's training process lives, as far as this machine can tell."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from mf_scale.rundir import RunDir

LOCK = ".lock"


@dataclass(frozen=True)
class Holder:
    """Who took the run directory's lock last."""

    pid: int
    host: str
    since: float
    """Unix seconds."""
    lives: bool | None
    """None: it is on another machine."""


def lock_holder(run: RunDir) -> Holder | None:
    """The last holder of the lock, by its content ("pid host token ..."); None where nobody ever took it.

    The lock itself is not tried: for that moment a training that starts would find it taken.
    """
    file = run.path / LOCK
    try:
        words = file.read_text(encoding="utf-8", errors="replace").split()
        since = file.stat().st_mtime
    except OSError:
        return None
    if len(words) < 2 or not words[0].isdecimal():
        return None
    pid, host = int(words[0]), words[1]
    return Holder(pid, host, since, _lives(pid) if host == socket.gethostname() else None)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
