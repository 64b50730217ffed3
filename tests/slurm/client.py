"""What a person at the login node does: submit, look, wait, cancel; every wait is bounded and explains itself."""

from __future__ import annotations

import re
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from tests.slurm.settings import Places

FINAL = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
"""States that a job does not leave by itself; on its way to a requeue it passes through some of them."""

_SETTLED = 4.0  # seconds after which a final state is one
_POLL = 0.1


class ClusterError(AssertionError):
    """Something did not happen in time; the message shows the queue, the nodes and the ends of the logs."""


class Client(ABC):
    """The commands of a SLURM user, on a cluster whose files lie in `places`."""

    places: Places

    @abstractmethod
    def login(
        self,
        *words: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        timeout: float = 30,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command at the login node, in a lean environment plus `env`; BoxError when late or (check) failing."""

    def sbatch(
        self, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | str | None = None, timeout: float = 30
    ) -> int:
        """Submit a job script; the job's number. BoxError holds sbatch's words where it refuses."""
        done = self.login("sbatch", "--parsable", *arguments, env=env, cwd=cwd, timeout=timeout)
        return int(done.stdout.strip().split("\n")[-1].split(";")[0])

    def scontrol(self, *words: str) -> str:
        """What `scontrol words...` prints."""
        return self.login("scontrol", *words).stdout

    def scancel(self, *words: str | int) -> None:
        """Cancel jobs (numbers or options of scancel); jobs that have ended are no error."""
        self.login("scancel", *map(str, words), check=False)

    def squeue(self, form: str = "%i %t %r %N %P", *words: str) -> list[str]:
        """One line a job that has not ended, in squeue's format letters."""
        return self.login("squeue", "--noheader", "--all", "-o", form, *words).stdout.split("\n")[:-1]

    def job(self, number: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Reason, Restarts, NodeList, BatchHost, ExitCode, StdOut, ..."""
        text = self.scontrol("show", "job", "--oneliner", str(number)).split("\n")[0]
        found = re.finditer(r"([A-Z][A-Za-z:/_-]*)=(.*?)(?= [A-Z][A-Za-z:/_-]*=|\s*$)", text)
        return {match[1]: match[2] for match in found}

    def state(self, number: int | str) -> str:
        """The job's state, COMPLETING while its nodes are being cleaned."""
        return self.job(number)["JobState"]

    def restarts(self, number: int | str) -> int:
        """How often the job was started again: SLURM_RESTART_COUNT of its present start."""
        return int(self.job(number)["Restarts"])

    def exit_code(self, number: int | str) -> int:
        """The exit code of a job's script (a signal's number where it died of one, negative)."""
        code, signal = self.job(number)["ExitCode"].split(":")
        return -int(signal) if int(signal) else int(code)

    def nodes_of(self, number: int | str) -> list[str]:
        """The nodes that the job runs (or last ran) on, the head node first."""
        names = self.job(number)["NodeList"]
        if names in ("", "(null)"):
            return []
        return self.scontrol("show", "hostnames", names).split()

    def node_states(self) -> dict[str, str]:
        """The state of each node in sinfo's words (idle, mixed, down, down*, drained, ...)."""
        lines = self.login("sinfo", "--noheader", "--Node", "--partition=low", "-o", "%N %T").stdout.splitlines()
        return dict(line.split() for line in lines)

    def output(self, number: int | str) -> str:
        """What the job has written so far; empty before it has written."""
        path = Path(self.job(number)["StdOut"])
        return path.read_text(errors="replace") if path.is_file() else ""

    def wait_until(self, what: str, true: Callable[[], object], timeout: float, *jobs: int) -> None:
        """Poll until `true()`; ClusterError, with the jobs' logs in it, after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not true():
            if time.monotonic() > deadline:
                raise ClusterError(f"not within {timeout:g} s: {what}\n{self.diagnosis(*jobs)}")
            time.sleep(_POLL)

    def wait_for(self, number: int, states: str | Collection[str], timeout: float) -> str:
        """Wait until the job is in one of the states; at once a ClusterError when it has ended in another one."""
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + timeout
        since: dict[str, float] = {}
        while (state := self.state(number)) not in wanted:
            since = {state: since.get(state, time.monotonic())}
            ended = state in FINAL and time.monotonic() - since[state] > _SETTLED
            if ended or time.monotonic() > deadline:
                why = "ended" if ended else f"after {timeout:g} s still"
                raise ClusterError(f"job {number} {why} {state}, not {sorted(wanted)}\n{self.diagnosis(number)}")
            time.sleep(_POLL)
        return state

    def wait_start(self, number: int, restarts: int, timeout: float) -> None:
        """Wait until the job runs its start number `restarts` (0 the first) or a later one."""

        def runs() -> bool:
            fields = self.job(number)
            return fields["JobState"] == "RUNNING" and int(fields["Restarts"]) >= restarts

        self.wait_until(f"job {number} running with {restarts} restarts", runs, timeout, number)

    def wait_output(self, number: int, text: str, timeout: float) -> None:
        """Wait until the job's log holds the text."""
        self.wait_until(f"{text!r} in the log of job {number}", lambda: text in self.output(number), timeout, number)

    def wait_node(self, node: str, states: str | Collection[str], timeout: float) -> None:
        """Wait until the node is in one of the states; `down` also matches SLURM's `down*` (silent)."""
        wanted = {states} if isinstance(states, str) else set(states)
        self.wait_until(
            f"node {node} {sorted(wanted)}", lambda: self.node_states()[node].rstrip("*") in wanted, timeout
        )

    def diagnosis(self, *jobs: int, lines: int = 25) -> str:
        """The queue, the nodes, the ends of the daemons' logs and of the jobs' logs, for a failed test's message."""
        parts = []
        for words in (["squeue", "--all"], ["sinfo", "-N", "-o", "%N %P %T %E"], ["scontrol", "show", "jobs"]):
            try:
                done = self.login(*words, timeout=10, check=False)
                parts.append(f"--- {' '.join(words)}\n{done.stdout}{done.stderr}")
            except (RuntimeError, OSError) as error:  # the cluster may be what is broken
                parts.append(f"--- {' '.join(words)}: {error}")
        logs = [(path.name, path) for path in sorted((self.places.folder / "log").glob("*.log"))]
        for number in jobs:
            try:
                logs.append((f"job {number}", Path(self.job(number)["StdOut"])))
            except (RuntimeError, OSError, KeyError) as error:
                parts.append(f"--- job {number}: {error}")
        parts += [f"--- end of {name}\n{tail(path, lines)}" for name, path in logs if path.is_file()]
        return "\n".join(parts)


def tail(path: Path, lines: int) -> str:
    """The last lines of a log, without what every daemon always says about MPI."""
    said = [line for line in path.read_text(errors="replace").splitlines() if "mpi/pmix" not in line]
    return "\n".join(said[-lines:])
