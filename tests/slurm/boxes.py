"""A box: one machine of the cluster, made of fresh namespaces around an init that ends with the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.slurm import processes

BRIDGE = "br0"
"""All links live in the controller's network namespace: neither this name nor an address can meet another cluster's."""

# Bash, since it reaps what is orphaned in the box. It waits on a pipe of the tests, so it ends, and the kernel
# with it every process of the box, also when the tests were killed and could clean nothing up.
_INIT = """
mount --bind "$1" /etc/hosts && mount -t tmpfs tmpfs /dev/shm || exit 1
if [ -n "$2" ]; then hostname "$2" && ip link set lo up || exit 1; fi
echo ready
read -r _
"""


class BoxError(RuntimeError):
    """A box could not be made, or a command in it failed or took too long."""


@dataclass
class Box:
    """A running box; `init` is its first process in the host's numbering."""

    name: str
    process: subprocess.Popen
    init: int

    def alive(self) -> bool:
        """Whether it is powered."""
        return self.process.poll() is None

    def kill(self) -> None:
        """Cut the power: every process of the box is killed by the kernel at once."""
        self.process.kill()  # unshare, whose child init dies with it

    def reap(self, timeout: float = 20) -> None:
        """Wait until nothing of the box is left."""
        self.process.wait(timeout)
        deadline = time.monotonic() + timeout
        while (Path("/proc") / str(self.init) / "ns").exists() and processes.read(self.init):
            if time.monotonic() > deadline:
                raise BoxError(f"box {self.name}: its processes did not end in {timeout:g} s")
            time.sleep(0.01)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()

    def enter(self, *spaces: str) -> list[str]:
        """The words that put a command into this box's namespaces (`--all` unless told)."""
        return ["nsenter", "--target", str(self.init), *(spaces or ("--all",)), "--"]

    def processes(self) -> list[processes.Process]:
        """Everything that runs in the box but its init."""
        return [process for process in processes.inside(self.init) if process.pid != self.init]


def start(name: str, hosts: Path, log: Path, network: bool) -> Box:
    """Make a box: own pid, mount, ipc spaces, with `network` also net and uts (the host name is then `name`)."""
    spaces = ["--mount", "--pid", "--ipc", "--fork", "--mount-proc", "--kill-child"]
    if network:
        spaces += ["--net", "--uts"]
    if Path("/proc/self/ns/time").exists():
        # Uptime 0: SLURM then sees that a node which comes back has booted anew.
        spaces += ["--time", "--boottime", str(-int(time.clock_gettime(time.CLOCK_BOOTTIME)))]
    with log.open("ab") as errors:
        process = subprocess.Popen(
            ["unshare", *spaces, "bash", "-c", _INIT, "box", str(hosts), name if network else ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={"PATH": os.defpath + ":/usr/sbin:/sbin"},
            start_new_session=True,
        )
    assert process.stdout
    ready = process.stdout.readline()  # ends at once when the init does
    children = [p.pid for p in processes.every() if p.parent == process.pid]
    if ready != b"ready\n" or len(children) != 1:
        process.kill()
        process.wait(20)
        raise BoxError(f"box {name} could not be made: {log.read_text()[-2000:] or 'no reason was given'}")
    return Box(name, process, children[0])


def call(
    words: Sequence[str], *, timeout: float, env: Mapping[str, str], check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command with its whole process group bounded in time; BoxError when it is late or, with `check`, fails."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=dict(env),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        # nsenter's child sits in another pid namespace but in the same group.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise BoxError(f"{' '.join(words)}: did not end in {timeout:g} s") from None
    if check and process.returncode:
        raise BoxError(f"{' '.join(words)}: exit code {process.returncode}\n{out}{err}")
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def bridge(controller: Box, address: str, env: Mapping[str, str]) -> None:
    """Make the switch that all nodes hang on, with the controller's own address on it."""
    for words in (
        ["link", "add", BRIDGE, "type", "bridge"],
        ["addr", "add", f"{address}/24", "dev", BRIDGE],
        ["link", "set", BRIDGE, "up"],
    ):
        call([*controller.enter("--net"), "ip", *words], timeout=20, env=env)


def plug(controller: Box, node: Box, address: str, env: Mapping[str, str]) -> None:
    """Lay a cable from a node's eth0 to the switch."""
    end = port(node.name)
    outside, inside = controller.enter("--net"), node.enter("--net")
    call([*outside, "ip", "link", "del", end], timeout=20, env=env, check=False)  # a cable of before its power cut
    peer = ["type", "veth", "peer", "name", "eth0", "netns", str(node.init)]
    call([*outside, "ip", "link", "add", end, *peer], timeout=20, env=env)
    call([*outside, "ip", "link", "set", end, "master", BRIDGE, "up"], timeout=20, env=env)
    call([*inside, "ip", "addr", "add", f"{address}/24", "dev", "eth0"], timeout=20, env=env)
    call([*inside, "ip", "link", "set", "eth0", "up"], timeout=20, env=env)


def port(node: str) -> str:
    """The name of a node's port on the switch (a link's name has 15 letters at most)."""
    return f"to-{node}"[:15]
