"""One training in a run directory: its lock, and who may take it over.

The lock is replaced by a whole new file, never written in place, and takers take turns at the file that is to replace
it. Whose token is no longer in it may not write any more (fence.py).
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mf_scale.distributed.env import job_start
from mf_scale.errors import FaultError, UserError
from mf_scale.file_locks import leads_to, try_lock
from mf_scale.rundir import RunDir, disk_errors, fsync_folder
from mf_scale.tracking.metrics import newest_start
from mf_scale.training.fence import LOCK, Fence, FencedError, Holder, read_holder
from mf_scale.training.slurm_jobs import still_known

_NEXT = ".lock.next"
"""The file that replaces `.lock`: who has it locked is the one that may look and take over."""
_TURN_SECONDS = 30.0
_POLL_SECONDS = 0.05
_GLANCE_SECONDS = 0.3


@dataclass(frozen=True)
class Taken:
    """The lock as this process took it."""

    fence: Fence
    start: int
    """The number of this start in the run directory: higher than that of every start before."""
    notes: list[str]


def take_lock(run: RunDir, held: list[int]) -> Taken:
    """Take the run directory's lock until the process ends or the handle in `held` is closed.

    Two trainings in one directory spoil each other, so it is refused where another one holds it (UserError), except by
    an older start of the same job, or by a job that SLURM no longer knows: then it is taken over. A start that is
    itself the older one is refused too (FencedError). On a file system without locks the newest start has it.
    """
    with disk_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        place, handle, notes = _take_turn(run)
    try:
        with disk_errors(run.path):
            mine, more = _successor(run, secrets.token_hex(8))
            os.ftruncate(handle, 0)
            os.pwrite(handle, mine.text.encode(), 0)
            os.fsync(handle)  # to the server, where the other nodes look
            place.rename(run.path / LOCK)
            fsync_folder(run.path)
    except BaseException:
        with suppress(OSError):
            place.unlink()
        os.close(handle)
        raise
    held.append(handle)
    # A loader worker that outlives a killed rank for some seconds must not hold its lock.
    os.register_at_fork(after_in_child=partial(let_go, held))
    return Taken(Fence(run.path / LOCK, mine.token), mine.start, [*notes, *more])


def let_go(held: list[int]) -> None:
    """Close the handles of a lock, and so release it; what it says stays."""
    while held:
        os.close(held.pop())


def _take_turn(run: RunDir) -> tuple[Path, int, list[str]]:
    """The file that is to replace the lock, its handle, locked where the file system has locks, and notes."""
    place, deadline = run.path / _NEXT, time.monotonic() + _TURN_SECONDS
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        free = try_lock(handle)
        if free and leads_to(place, handle):
            return place, handle, []
        os.close(handle)
        if free is None:
            place.unlink(missing_ok=True)
            alone = run.path / f"{_NEXT}.{secrets.token_hex(8)}"
            note = f"this file system has no locks: take care that only one job trains in {run.path}"
            return alone, os.open(alone, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), [note]
        if time.monotonic() > deadline:
            what = f"another process has been about to take this run directory's lock for {_TURN_SECONDS:.0f} s"
            raise FaultError(what, where=str(place))
        if not free:
            time.sleep(_POLL_SECONDS)


def _is_held(handle: int) -> bool:
    """Whether another process holds the lock on; False where there are no locks: the newest start has it then."""
    deadline = time.monotonic() + _GLANCE_SECONDS
    while (free := try_lock(handle)) is False and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)  # mf-scale doctor, which looks whether it is held, holds it for an instant
    return free is False


def _successor(run: RunDir, token: str) -> tuple[Holder, list[str]]:
    """What this process writes into the lock, and notes; UserError or FencedError where it may not."""
    job = job_start()
    mine = Holder(str(os.getpid()), socket.gethostname(), token, job.job if job else None, job.restart if job else 0, 0)
    try:
        handle = os.open(run.path / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return _numbered(run, mine, None), []
    try:
        holder = read_holder(os.pread(handle, 400, 0).decode(errors="replace"))
        if holder is not None and mine.is_older(holder):
            raise _overtaken(run, holder)
        return _numbered(run, mine, holder), _may_follow(run, handle, holder, mine)
    finally:
        os.close(handle)


def _numbered(run: RunDir, mine: Holder, before: Holder | None) -> Holder:
    start = 1 + max(before.start if before else 0, newest_start(run.metrics))
    return replace(mine, start=start)


def _may_follow(run: RunDir, handle: int, holder: Holder | None, mine: Holder) -> list[str]:
    """A note where the lock is taken over from one that holds it still; UserError where it must not be."""
    if not _is_held(handle):
        return []
    if holder is not None and holder.is_older(mine):
        return [f"the run was taken over from an older start of this job ({holder}, pid {holder.pid}), which is fenced"]
    if holder is not None and holder.job not in (None, mine.job) and not still_known(str(holder.job)):
        return [f"the run was taken over from {holder} (pid {holder.pid}): SLURM no longer runs it, and it is fenced"]
    who = f"{holder.pid} {holder.host}" if holder is not None else "unknown"
    of_job = f", job {holder.job}, restart {holder.restart}" if holder is not None and holder.job else ""
    stop = f"stop it (scancel {holder.job})" if of_job and holder is not None else "stop it"
    raise UserError(
        f"another process is training in this run directory (pid and host: {who}{of_job})",
        where=str(run.path),
        remedy=f"Wait for it or {stop}, or choose another run_dir.",
    )


def _overtaken(run: RunDir, holder: Holder) -> FencedError:
    what = f"another start of this run ({holder}) came after this one, which must not go on with it"
    remedy = f"If SLURM counts its jobs from anew, so that this is another job, remove {run.path / LOCK}."
    return FencedError(what, where=str(run.path), remedy=remedy)
