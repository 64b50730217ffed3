"""The file in which rank 0 of a SLURM step says where it listens, and the way to it.

It is named after the start (job, restart, step), so that starts never mix, and is there only while the ranks gather.
A port says nothing of who answers it: the store there must know the nonce.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from mf_scale.distributed.env import job_start
from mf_scale.errors import UserError

NONCE = "nonce"
"""Under which rank 0's store has it."""
_PREFIX = ".meeting-"
_KNOCK_SECONDS = 3.0
_STALE_SECONDS = 3600.0
"""A file that old was left by a rank 0 that was killed: no meeting takes as long."""


@dataclass(frozen=True)
class Invitation:
    """What rank 0 says."""

    addresses: tuple[str, ...]
    """To be tried in this order."""
    port: int
    nonce: str


def invitation_name(environment: Mapping[str, str] = os.environ) -> str | None:
    """Name of the file of this start; None where this process is no task of a SLURM step."""
    start, step = job_start(environment), environment.get("SLURM_STEP_ID", "")
    return f"{_PREFIX}{start.job}-{start.restart}-{step}" if start is not None and step.isdecimal() else None


def publish(file: Path, invitation: Invitation) -> None:
    """Write the file, whole or not at all; UserError where the folder cannot be written."""
    fresh = file.with_name(f".{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(asdict(invitation)), encoding="utf-8")
        fresh.replace(file)
    except OSError as error:
        raise _unwritable(file.parent, error.strerror or str(error)) from error


def refuse_unwritable(folder: Path) -> None:
    """UserError where the folder cannot be written, as `publish` will find on rank 0, which then never comes."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise _unwritable(folder, f"{nearest} is no folder that can be written")


def _unwritable(folder: Path, why: str) -> UserError:
    return UserError(
        f"the ranks cannot meet in this folder: {why}",
        where=str(folder),
        remedy="Let it be one that this user may write to, on a file system that all nodes share; or set MASTER_ADDR "
        "and MASTER_PORT.",
    )


def sweep(file: Path) -> None:
    """Remove what rank 0 of earlier starts of this job left behind, and of any job an hour before this file."""
    (job, restart), now = _start_of(file), file.stat().st_mtime  # the file server's clock, as of the others
    for other in file.parent.glob(f"*{_PREFIX}*"):
        its_job, its_restart = _start_of(other)
        with contextlib.suppress(OSError):
            earlier = its_job == job and its_restart < restart
            if its_job and (earlier or now - other.stat().st_mtime > _STALE_SECONDS):
                other.unlink()


def _start_of(file: Path) -> tuple[str, int]:
    """Job and restart in a file's name; an empty job where it is no invitation."""
    found = re.fullmatch(rf"\.?{re.escape(_PREFIX)}([0-9_]+)-(\d+)-\d+", file.name)
    return (found[1], int(found[2])) if found else ("", 0)


class Door:
    """The way to rank 0's store, as one rank tries it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.store: TCPStore | None = None
        self.state = "there is no file yet"
        """What was found at the last try."""

    def opens(self) -> bool:
        """Look for the file and try its addresses once; True with `store` set where rank 0 was found."""
        try:
            # A network file system that once said there is no such file goes on saying so, but for a fresh listing.
            list(self._file.parent.iterdir())
            invitation = _read(self._file)
        except FileNotFoundError:
            self.state = "there is no file yet"
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.state = f"the file cannot be read ({error})"
            return False
        tried = []
        for address in invitation.addresses:
            self.store, answer = _knock(address, invitation)
            if self.store is not None:
                self.state = f"{address} port {invitation.port}"
                return True
            tried.append(f"{address} ({answer})")
        self.state = f"port {invitation.port} of {', '.join(tried)}"
        return False


def _read(file: Path) -> Invitation:
    data = json.loads(file.read_text(encoding="utf-8"))
    return Invitation(tuple(str(a) for a in data["addresses"]), int(data["port"]), str(data["nonce"]))


def _knock(address: str, invitation: Invitation) -> tuple[TCPStore | None, str]:
    """The store at an address if it is rank 0's; else None and what happened there."""
    try:
        with socket.create_connection((address, invitation.port), timeout=_KNOCK_SECONDS) as line:
            number = str(line.getpeername()[0])  # torch would look the name up again, and complain of it aloud
    except (OSError, UnicodeError) as error:
        return None, getattr(error, "strerror", None) or str(error)
    found: list[TCPStore] = []

    def connect() -> None:
        limit = timedelta(seconds=_KNOCK_SECONDS)
        with contextlib.suppress(RuntimeError):
            store = TCPStore(number, invitation.port, is_master=False, timeout=limit, wait_for_workers=False)
            if store.check([NONCE]) and store.get(NONCE).decode() == invitation.nonce:
                found.append(store)

    # In a thread that can be left behind: torch waits without end for somebody who takes the call and says nothing.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(2 * _KNOCK_SECONDS)
    return (found[0], "") if found else (None, "somebody else answers")
