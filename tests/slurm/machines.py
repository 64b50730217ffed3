"""The machines of a cluster: commands and processes on them, and the faults that tests make."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.slurm import boxes, clock, settings
from tests.slurm.boxes import Box, BoxError
from tests.slurm.client import Client
from tests.slurm.processes import Process
from tests.slurm.settings import CONTROLLER, Places

PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


class Machines(Client):
    """The controller and the nodes, each a box that may be asked, looked into and broken."""

    def __init__(self, places: Places, network: bool) -> None:
        self.places = places
        self.network = network
        self.nodes: list[str] = []
        self.cut: set[str] = set()
        self._boxes: dict[str, Box] = {}
        self._mounts: dict[str, list[Path]] = {}

    def _box(self, name: str) -> None:
        self._boxes[name] = boxes.start(name, self.places.hosts, self.places.log(f"box.{name}"), self.network)

    # -- commands

    def _lean(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a fresh login has; nothing of the tests' own environment but where compiled things are kept."""
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
        lean = {
            "PATH": PATH,
            "HOME": str(self.places.folder / "home"),
            "USER": "root",
            "LOGNAME": "root",
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
            "XDG_CACHE_HOME": cache,
            "SLURM_CONF": str(self.places.conf),
        }
        return {**lean, **(env or {})}

    def login(
        self,
        *words: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        timeout: float = 30,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command at the login node: it sees the host's files and processes, and the cluster's network."""
        # The /proc of this host stays in sight, so that a shell script's <( ) and /dev/fd work.
        spaces = ["--net", "--uts"] if self.network else ["--ipc"]
        enter = [*self._boxes[CONTROLLER].enter(*spaces), "env", "-C", str(cwd or self.places.folder / "home")]
        return boxes.call([*enter, *words], timeout=timeout, env=self._lean(env), check=check)

    def run(
        self,
        node: str,
        *words: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | str = "/",
        timeout: float = 30,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node (or `ctl`), in all its namespaces; BoxError when late or (check) failing."""
        enter = [*self._boxes[node].enter(), "env", "-C", str(cwd)]
        return boxes.call([*enter, *words], timeout=timeout, env=self._lean(env), check=check)

    def processes(self, node: str) -> list[Process]:
        """All that runs on a node, with the host's pids; empty for a node without power."""
        return self._boxes[node].processes() if self.powered(node) else []

    def ranks(self, job: int, node: str | None = None) -> dict[int, Process]:
        """The task processes of a job's step by rank, on one node or on all of them."""
        found = {}
        for name in [node] if node else self.nodes:
            running = self.processes(name)
            title = f"slurmstepd: [{job}."
            steps = {p.pid for p in running if p.command.startswith(title) and ".batch]" not in p.command}
            for process in running:
                rank = process.environment().get("SLURM_PROCID", "") if process.parent in steps else ""
                if rank:
                    found[int(rank)] = process
        return dict(sorted(found.items()))

    # -- faults

    def powered(self, node: str) -> bool:
        """Whether the node has power."""
        return node in self._boxes and self._boxes[node].alive()

    def kill_node(self, node: str) -> None:
        """Cut a node's power: all its processes die at once, unasked."""
        self._known(node)
        box = self._boxes.pop(node)
        box.kill()
        box.reap()
        self._mounts.pop(node, None)
        self.cut.discard(node)

    def start_node(self, node: str) -> None:
        """Boot a node (nothing where it runs)."""
        self._known(node)
        if self.powered(node):
            return
        self._box(node)
        if self.network:
            address = settings.address(self.nodes.index(node) + 1)
            boxes.plug(self._boxes[CONTROLLER], self._boxes[node], address, self._lean())
        self.start_daemon(node)

    def start_daemon(self, node: str) -> None:
        """Start a node's slurmd."""
        self.run(node, "slurmd", "-N", node)

    def kill_daemon(self, node: str, with_jobs: bool = False) -> None:
        """kill -9 a node's slurmd, and with `with_jobs` everything on the node: steps, batch shells and tasks."""
        for process in self.processes(node):
            if with_jobs or process.command.startswith("slurmd "):
                process.kill()

    def cut_node(self, node: str) -> None:
        """Unplug a node's network; its processes go on."""
        self._switch(node, "down")
        self.cut.add(node)

    def join_node(self, node: str) -> None:
        """Plug a node's network in again."""
        self._switch(node, "up")
        self.cut.discard(node)

    def _switch(self, node: str, state: str) -> None:
        self._known(node)
        if not self.network:
            raise BoxError("no network can be cut here: all nodes share this host's loopback")
        enter = self._boxes[CONTROLLER].enter("--net")
        boxes.call([*enter, "ip", "link", "set", boxes.port(node), state], timeout=20, env=self._lean())

    def hide(self, node: str, path: Path) -> None:
        """Show this node an empty folder in place of a folder; the others and the host see it as before."""
        self.run(node, "mount", "-t", "tmpfs", "-o", "mode=755", "hidden", str(path))
        self._mounts.setdefault(node, []).append(path)

    def overlay(self, node: str, path: Path, source: Path) -> None:
        """Show this node `source` (a file for a file, a folder for a folder) at `path`."""
        self.run(node, "mount", "--bind", str(source), str(path))
        self._mounts.setdefault(node, []).append(path)

    def unhide(self, node: str) -> None:
        """Take every `hide` and `overlay` of a node back."""
        for path in reversed(self._mounts.pop(node, [])):
            self.run(node, "umount", "--lazy", str(path))

    def task_environment(self, node: str, **variables: str) -> None:
        """Give these variables to every task that starts on this node from now on (none: end that)."""
        text = "".join(f"export {name}={value}\n" for name, value in variables.items())
        self.places.task_environment(node).write_text(text)

    def skew_clock(self, node: str, seconds: int) -> None:
        """Let the tasks that start on this node from now on see a clock that is `seconds` off; 0: the true one."""
        if seconds:
            library = clock.build(self.places.folder / "dev")
            self.task_environment(node, LD_PRELOAD=str(library), CLOCK_SHIFT_S=str(seconds))
        else:
            self.task_environment(node)

    def _known(self, node: str) -> None:
        if node not in self.nodes:
            raise ValueError(f"no node {node!r}: there are {', '.join(self.nodes)}")
