"""A real SLURM on this machine: munged, slurmctld and a slurmd for each node, in boxes that tests may break.

    with Cluster(folder) as cluster:
        job = cluster.sbatch("--nodes=2", "script.sh", cwd=folder)
        cluster.wait_for(job, "COMPLETED", timeout=30)

Everything lies in one private folder and ends with it; a cluster whose owner was killed ends by itself.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path
from types import TracebackType

from tests.slurm import boxes, names, settings
from tests.slurm.machines import PATH, Machines
from tests.slurm.settings import CONTROLLER, Places, Settings

_COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "ip", "unshare", "nsenter", "bash")


def unavailable() -> str | None:
    """Why no cluster can be made on this machine; None where it can."""
    if os.geteuid() != 0:
        return "a test cluster needs root (mounts and namespaces)"
    missing = [name for name in _COMMANDS if not shutil.which(name, path=PATH)]
    if missing:
        return f"no {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge iproute2"
    words = ["unshare", "--mount", "--pid", "--ipc", "--fork", "true"]
    tried = subprocess.run(words, check=False, capture_output=True, text=True, timeout=20)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def own_network() -> bool:
    """Whether the kernel lets a box have a network, and a bridge in it."""
    words = ["unshare", "--net", "--uts", "ip", "link", "add", "br0", "type", "bridge"]
    return subprocess.run(words, check=False, capture_output=True, timeout=20).returncode == 0


class Cluster(Machines):
    """A SLURM of a few nodes with partitions `low` (preemptable, the default) and `high`."""

    def __init__(self, folder: Path, wanted: Settings | None = None) -> None:
        """`folder` is made by `up`, and removed with all in it by `down`; keep its path short (a socket lies in it)."""
        self.settings = wanted or Settings()
        super().__init__(Places(folder), own_network() if self.settings.network is None else self.settings.network)
        self._cgroups: list[Path] = []

    def __enter__(self) -> Cluster:
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.down()

    # -- life

    def up(self, timeout: float = 60) -> None:
        """Start everything and wait until all nodes are idle."""
        atexit.register(self.down)
        try:
            self._up(timeout)
        except BaseException:
            self.down()
            raise

    def _up(self, timeout: float) -> None:
        places, wanted = self.places, self.settings
        names.sweep()
        places.folder.mkdir(parents=True)
        names.own(places.folder)
        places.make()
        grouped = wanted.proctrack in ("auto", "cgroup")
        self.nodes, self._cgroups = names.choose(places.folder, wanted.nodes, grouped)
        proctrack = ("cgroup" if self._cgroups else "linuxproc") if wanted.proctrack == "auto" else wanted.proctrack
        self._configure(proctrack)
        self._box(CONTROLLER)
        if self.network:
            boxes.bridge(self._boxes[CONTROLLER], settings.address(0), self._lean())
        munge = places.folder / "munge"
        files = {"key": munge / "key", "seed": munge / "seed", "pid": munge / "pid", "log": places.log("munged")}
        options = [f"--{name}-file={path}" for name, path in files.items()]
        first = ("nice", "-n", "-5")  # a busy machine must not make the controller late
        self.run(CONTROLLER, *first, "munged", f"--socket={places.socket}", *options)
        self.run(CONTROLLER, *first, "slurmctld", "-c")
        self.wait_until("slurmctld answers", self._answers, timeout)
        for node in self.nodes:
            self.start_node(node)
        self.wait_idle(timeout)

    def down(self) -> None:
        """End every process of the cluster and remove its files; safe to call at any time and again."""
        atexit.unregister(self.down)
        for box in self._boxes.values():
            box.kill()
        for box in self._boxes.values():
            box.reap()
        self._boxes.clear()
        self._mounts.clear()
        self.cut.clear()
        names.give_back(self._cgroups)
        self._cgroups = []
        shutil.rmtree(self.places.folder, ignore_errors=True)

    def _configure(self, proctrack: str) -> None:
        places, wanted = self.places, self.settings
        etc = places.folder / "etc"
        key = places.folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for gpu in range(wanted.gpus):
            device = places.folder / f"dev/gpu{gpu}"
            os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # a second /dev/null under the name of a GPU
            device.chmod(0o666)
        places.hosts.write_text(settings.hosts_text(self.nodes, self.network, socket.gethostname()))
        ports = None if self.network else names.free_ports(1 + len(self.nodes))
        places.conf.write_text(settings.slurm_conf(places, self.nodes, wanted, proctrack, ports))
        (etc / "gres.conf").write_text(settings.gres_conf(places, self.nodes, wanted.gpus))
        (etc / "cgroup.conf").write_text(settings.CGROUP_CONF)
        prolog = etc / "task-prolog"
        prolog.write_text(settings.TASK_PROLOG.format(folder=places.folder))
        prolog.chmod(0o755)

    def _answers(self) -> bool:
        return "is UP" in self.login("scontrol", "ping", check=False).stdout

    def heal(self, timeout: float = 60) -> None:
        """Cancel all jobs, repair all nodes, and wait until they are idle."""
        self.cancel_all()
        for node in self.nodes:
            if node in self.cut:
                self.join_node(node)
            if not self.powered(node):
                self.start_node(node)
            self.unhide(node)
            if not any(p.command.startswith("slurmd ") for p in self.processes(node)):
                self.start_daemon(node)
            self.places.task_environment(node).unlink(missing_ok=True)
        self.wait_idle(timeout)

    def cancel_all(self) -> None:
        """Cancel every job of the cluster, without the time that SLURM gives them to end by themselves."""
        if jobs := sorted(set(self.squeue("%A"))):
            self.scancel(*jobs)
            # Tasks before their batch shells and sruns, whom they would try for seconds to tell of their end.
            self._kill_children("0123456789")
            time.sleep(0.3)
            self._kill_children("b")

    def _kill_children(self, steps: str) -> None:
        """Kill the tasks of the steps whose names begin with one of these letters."""
        for node in self.nodes:
            running = self.processes(node)
            keepers = (p for p in running if p.command.startswith("slurmstepd: ["))
            wanted = {p.pid for p in keepers if p.command.partition(".")[2][:1] in set(steps)}
            for process in running:
                if process.parent in wanted:
                    process.kill()

    def wait_idle(self, timeout: float) -> None:
        """Wait until no job is left and every node is idle, bringing back those that SLURM set aside."""

        def idle() -> bool:
            states = self.node_states()
            for node, state in states.items():
                if state.rstrip("*") in ("drained", "draining", "down") and "*" not in state:
                    self.login("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            return set(states) == set(self.nodes) and set(states.values()) == {"idle"} and not self.squeue()

        self.wait_until("every node idle", idle, timeout)
