"""Processes as the host's /proc shows them; a pid counts only together with its start time."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One process: its pid in the host's numbering (not the box's) and what tells it from a later owner of the pid."""

    pid: int
    parent: int
    started: int  # clock ticks since boot
    command: str

    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        now = read(self.pid)
        return now is not None and now.started == self.started

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless the process has ended."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def environment(self) -> dict[str, str]:
        """The variables it was started with; none for one that has ended."""
        try:
            raw = Path(f"/proc/{self.pid}/environ").read_bytes()
        except OSError:
            return {}
        lines = raw.decode(errors="replace").split("\0")
        return dict(line.split("=", 1) for line in lines if "=" in line)


def read(pid: int) -> Process | None:
    """The process of this pid; None where there is none or only its zombie."""
    try:
        # The name in brackets may hold anything, even brackets: fields are counted from the last one.
        state, parent, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    if state in "ZX":
        return None
    return Process(pid, int(parent), int(rest[17]), command.replace(b"\0", b" ").decode(errors="replace").strip())


def every() -> list[Process]:
    """All processes of the machine, in the order of their pids."""
    pids = sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [process for pid in pids if (process := read(pid))]


def inside(init: int) -> list[Process]:
    """The processes of the pid namespace whose first process is `init`."""
    space = _space(init)
    return [process for process in every() if space and _space(process.pid) == space]


def _space(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""
