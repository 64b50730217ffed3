"""The faults of a cluster that a long schedule brings upon one job: their kinds, their moments, how each is made."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tests.slurm.processes import Process
from tests.slurm.testbed import Cluster

DEATHS = (
    "rank killed",
    "ranks of a node killed",
    "one: slurmd and tasks killed",
    "head: power cut",
    "other: power cut",
    "both: power cut",
)
ASKED = ("preemption", "requeue", "SIGUSR1 to a rank", "SIGTERM to a rank")
RUNS_ON = "both: slurmd alone killed"
"""Nothing ends the ranks, which train on beside the start that takes over from them."""
CUTS = ("head: network cut", "other: network cut", "head: slurmd alone killed", "other: slurmd alone killed", RUNS_ON)
NEAR_LIMIT = "time limit near"
SLOW = ("rank hung", NEAR_LIMIT)
KINDS = (*DEATHS, *ASKED, *CUTS, *SLOW)
TRAINING, STARTING, SAVING = "in training", "in the start", "in a save"

Mend = Callable[[], None]


@dataclass
class Fault:
    """One fault, and what was known when it came."""

    kind: str
    moment: str
    time: float = 0.0
    """Unix seconds."""
    launch: int = 0
    """Place of the start that was hit in launches.jsonl."""
    restarts: int = -1
    """Of the job by then, as SLURM counts."""


def schedule(faults: int, chance: random.Random) -> list[Fault]:
    """As many faults, each kind once before one comes again, at random moments at which the kind can come."""
    deck: list[str] = []
    drawn = []
    for _ in range(faults):
        deck = deck or chance.sample(KINDS, len(KINDS))
        kind = deck.pop()
        moments = [TRAINING]
        if kind not in (*SLOW, RUNS_ON):
            moments.append(STARTING)
        if kind in DEATHS:
            moments.append(SAVING)
        drawn.append(Fault(kind, chance.choice(moments)))
    if drawn:
        drawn[0].moment = TRAINING
    return drawn


def strike(
    cluster: Cluster, job: int, kind: str, tasks: dict[int, Process], nodes: list[str], chance: random.Random
) -> Mend | None:
    """Make a fault of the job on `nodes` (the head node first) with these ranks; what mends it, where it lasts."""
    place, _, plain = kind.rpartition(": ")
    if place:
        struck = {"head": nodes[:1], "other": nodes[1:], "both": nodes, "one": [chance.choice(nodes)]}[place]
        return _strike_nodes(cluster, plain, struck)
    if plain == "rank killed":
        _any(tasks, chance).kill()
    elif plain == "ranks of a node killed":
        half = chance.randint(0, 1)
        for rank in (2 * half, 2 * half + 1):
            tasks[rank].kill()
    elif plain == "rank hung":
        _any(tasks, chance).kill(signal.SIGSTOP)
    elif plain == "preemption":
        # One node more than are idle.
        where = cluster.places.folder
        cluster.sbatch("--partition=high", "--nodes=3", "--exclusive", "--wrap=sleep 1", cwd=where)
    elif plain == "requeue":
        cluster.scontrol("requeue", str(job))
    elif plain == NEAR_LIMIT:
        # So near that the warning is due, and far enough for the controller, which looks every half minute.
        hours, minutes, _ = cluster.job(job)["RunTime"].split(":")
        cluster.scontrol("update", f"JobId={job}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")
        return partial(_give_time, cluster, job)
    else:
        _any(tasks, chance).kill(signal.Signals[plain.split()[0]])
    return None


def _strike_nodes(cluster: Cluster, plain: str, nodes: list[str]) -> Mend:
    ways: dict[str, tuple[Callable[[str], None], Callable[[str], None]]] = {
        "slurmd and tasks killed": (partial(cluster.kill_daemon, with_jobs=True), cluster.start_daemon),
        "slurmd alone killed": (cluster.kill_daemon, cluster.start_daemon),
        "power cut": (cluster.kill_node, cluster.start_node),
        "network cut": (cluster.cut_node, cluster.join_node),
    }
    harm, mend = ways[plain]
    for node in nodes:
        harm(node)

    def mended() -> None:
        for node in nodes:
            mend(node)

    return mended


def _give_time(cluster: Cluster, job: int) -> None:
    cluster.scontrol("update", f"JobId={job}", "TimeLimit=60")


def _any(tasks: dict[int, Process], chance: random.Random) -> Process:
    return tasks[chance.choice(sorted(tasks))]
