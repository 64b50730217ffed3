"""The fence: a start whose token is no longer in the run directory's lock may not write there any more.

`.lock` holds "pid host token job restart start" of who took it last: job "-" and restart 0 outside SLURM, start the
number of the start in this run directory.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mf_scale.errors import FaultError, GuardError
from mf_scale.rundir import write_atomically

LOCK = ".lock"
_AGAIN_SECONDS = 1.0
_NO_JOB = "-"


class FencedError(GuardError):
    """Another start has taken this run over: this one, cut off from it, stops without writing anything.

    Exit code 3, on which no job script requeues: SLURM has requeued the job already, which is why there is another.
    """


@dataclass(frozen=True)
class Holder:
    """Who took the lock."""

    pid: str
    host: str
    token: str
    job: str | None
    """None: outside SLURM."""
    restart: int
    start: int
    """0: unknown."""

    @property
    def text(self) -> str:
        """The lock file's content."""
        return f"{self.pid} {self.host} {self.token} {self.job or _NO_JOB} {self.restart} {self.start}\n"

    def is_older(self, other: Holder) -> bool:
        """An older start of the job that `other` is of."""
        return self.job is not None and self.job == other.job and self.restart < other.restart

    def __str__(self) -> str:
        if self.job is None:
            return f"pid {self.pid} on {self.host}"
        return f"job {self.job}, restart {self.restart}, on {self.host}"


@dataclass(frozen=True)
class Fence:
    """What a start checks before it writes into the run directory; the same on all ranks, checked by rank 0."""

    path: Path
    """Of the lock."""
    token: str

    def check(self) -> None:
        """Raise FencedError where the lock is no longer this start's, FaultError where it cannot be read, twice.

        Costs one small read. Between it and the write that it stands before lies a moment: what must not happen even
        then is a rename out of, or into, a folder that carries the token, which a new start has swept away before it
        looks what is there.
        """
        holder = read_holder(self.read())
        if holder is None or holder.token != self.token:
            raise fenced(holder, self.path.parent)

    def read(self) -> str:
        """The lock's content; empty where it or the run directory is gone. FaultError where two readings fail."""
        try:
            return self._read()
        except OSError:
            time.sleep(_AGAIN_SECONDS)
        try:
            return self._read()
        except OSError as error:
            what = f"cannot read whether this start may still write: {error.strerror or error}"
            raise FaultError(what, where=str(self.path)) from error

    def _read(self) -> str:
        with suppress(FileNotFoundError, NotADirectoryError):
            return self.path.read_text(encoding="utf-8", errors="replace")
        return ""

    def write(self, file: Path, text: str) -> None:
        """`write_atomically`, checked before the file takes its name."""
        write_atomically(file, text, mark=self.token, check=self.check)


def fenced(holder: Holder | None, run: Path) -> FencedError:
    """The error of a start that `holder` (none: nobody knows who) has taken the run over from."""
    if holder is None:
        what = "the run directory or its lock is gone, so this start cannot know whether it may still write: it stops"
        return FencedError(what, where=str(run))
    what = f"another start of this run ({holder}) has taken over; this one, cut off, stops without writing"
    return FencedError(what, where=str(run), remedy="Nothing is to be done: the run goes on there.")


def read_holder(text: str) -> Holder | None:
    """What a lock file says; None where it does not even name a process."""
    words = text.split()
    if len(words) < 2:
        return None
    pid, host, token, job, restart, start = [*words, *["", _NO_JOB, "0", "0"][len(words) - 2 :]][:6]
    return Holder(pid, host, token, None if job == _NO_JOB else job, _number(restart), _number(start))


def _number(word: str) -> int:
    return int(word) if word.isdecimal() else 0
