"""What clusters of one machine could quarrel about: node names (cgroups are named after them), ports, left folders."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path

from tests.slurm import processes

PREFIX = "mf-slurm-"
"""How the temporary folders begin in which tests keep their clusters."""

_FREEZER = Path("/sys/fs/cgroup/freezer")
_OWNER, _GROUPS = "owner", "cgroups"


def choose(folder: Path, count: int, grouped: bool) -> tuple[list[str], list[Path]]:
    """Names for the nodes and, where a freezer can be written and `grouped`, the cgroups that reserve them."""
    if grouped and (_FREEZER / "cgroup.procs").exists():
        for prefix in ("node", *(f"node{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")):
            nodes = [f"{prefix}{number}" for number in range(1, count + 1)]
            groups = [_FREEZER / f"slurm_{node}" for node in nodes]
            if _reserve(groups):
                (folder / _GROUPS).write_text("".join(f"{group}\n" for group in groups))
                return nodes, groups
    return [f"node{number}" for number in range(1, count + 1)], []


def _reserve(groups: list[Path]) -> bool:
    """Make all these cgroups or none: one that exists belongs to another cluster."""
    made: list[Path] = []
    for group in groups:
        try:
            group.mkdir()
        except OSError:
            give_back(made)
            return False
        made.append(group)
    return True


def give_back(groups: list[Path]) -> None:
    """Remove cgroups with all below them; they are empty of processes by now."""
    for group in groups:
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()


def own(folder: Path) -> None:
    """Write down whose folder this is."""
    me = processes.read(os.getpid())
    assert me
    (folder / _OWNER).write_text(f"{me.pid} {me.started}")


def sweep() -> None:
    """Remove the folders and cgroups of clusters whose owners were killed before they could do it."""
    for note in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/*/{_OWNER}"):
        folder = note.parent
        try:
            pid, started = map(int, note.read_text().split())
            owner = processes.read(pid)
            if owner and owner.started == started:
                continue
            groups = (folder / _GROUPS).read_text().split() if (folder / _GROUPS).exists() else []
        except (OSError, ValueError):
            continue
        give_back([Path(group) for group in groups if Path(group).parent == _FREEZER])
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
