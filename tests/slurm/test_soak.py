"""A schedule of random faults of a cluster on one job: `make soak FAULTS=20`."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.program import Run
from tests.slurm.jobs import OURS, Training, assert_same_history
from tests.slurm.testbed import Cluster

SMALLER = ("train.global_batch=4", "train.hang_timeout=20", "launch.fruitless_starts=20")
DEATHS = ("rank killed", "ranks of a node killed", "slurmd and tasks killed", "head: power cut", "other: power cut")
ASKED = ("preemption", "requeue", "SIGUSR1 to a rank", "SIGTERM to a rank")
CUTS = ("head: network cut", "other: network cut", "head: slurmd alone killed", "other: slurmd alone killed")
SLOW = ("rank hung", "time limit near")
KINDS = (*DEATHS, *ASKED, *CUTS, *SLOW)
TRAINING, STARTING, SAVING = "in training", "in the start", "in a save"
WARNING = 100
"""Seconds ahead of the time limit at which the job script gets its USR1."""


@dataclass
class Fault:
    """One fault, and what was known when it came."""

    kind: str
    moment: str
    time: float = 0.0
    """Unix seconds."""
    start: int = 0
    """Number of the newest start that had come to training."""
    launch: int = 0
    """Place of the start that was hit in launches.jsonl."""
    restarts: int = 0
    """Of the job by then, as SLURM counts."""


def schedule(faults: int, chance: random.Random) -> list[Fault]:
    """As many faults, each kind once before one comes again, at random moments at which the kind can come."""
    deck: list[str] = []
    drawn = []
    for _ in range(faults):
        deck = deck or chance.sample(KINDS, len(KINDS))
        kind = deck.pop()
        moments = (
            [TRAINING] if kind in SLOW else [TRAINING, STARTING, SAVING] if kind in DEATHS else [TRAINING, STARTING]
        )
        drawn.append(Fault(kind, chance.choice(moments)))
    drawn[0].moment = TRAINING
    return drawn


class Soak:
    """Brings the faults of a schedule upon one training."""

    def __init__(self, training: Training, faults: list[Fault], chance: random.Random) -> None:
        self.training, self.faults, self.chance = training, faults, chance
        self.cluster = training.cluster
        self.done: list[Fault] = []

    # -- what is so now

    def lines(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl as it was written, also superseded ones."""
        file = self.training.run.folder / "metrics.jsonl"
        text = file.read_text(errors="replace") if file.is_file() else ""
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def start(self) -> tuple[int, int]:
        """The number of the newest start that came to training, and how many steps it has taken."""
        lines = self.lines()
        newest = max((line["start"] for line in lines), default=0)
        return newest, sum(line["start"] == newest and line["event"] == "step" for line in lines)

    def restarts(self) -> int:
        return self.cluster.restarts(self.training.job)

    def until(self, what: str, true: Callable[[], object], timeout: float) -> None:
        """As wait_until, but at its end as soon as the job has ended for good."""
        ended: list[float] = []

        def over() -> bool:
            gone = not self.cluster.squeue("%i", f"--jobs={self.training.job}")
            ended[:] = [*ended, time.monotonic()] if gone else []
            assert not ended or ended[-1] - ended[0] < 10, f"the job ended before: {what}\n{self.training.log[-3000:]}"
            return bool(true())

        self.cluster.wait_until(what, over, timeout, self.training.job)

    # -- the schedule

    def pace(self, fault: str | None) -> None:
        """What the steps of the next starts are slowed down by."""
        for node in self.cluster.nodes:
            self.cluster.task_environment(node, **({"MF_SCALE_FAULT": fault} if fault else {}))

    def run(self) -> None:
        before = Fault("", "")
        for number, fault in enumerate(self.faults):
            follows = self.faults[number + 1].moment if number + 1 < len(self.faults) else TRAINING
            self.until_moment(fault, before)
            tasks = self.training.tasks()
            names = self.cluster.nodes_of(self.training.job)
            fault.start, _ = self.start()
            fault.restarts, fault.launch = self.restarts(), len(self.training.launches) - 1
            if fault is self.faults[-1]:
                self.pace(None)
            if fault.moment == SAVING:
                self.until("a save", self.saves, 90)
            fault.time = time.time()
            self.done.append(fault)
            mend = self.strike(fault.kind, tasks, names)
            self.until_restarted(fault)
            self.until_mended(mend, fault, patient=follows != STARTING)
            before = fault

    def until_moment(self, fault: Fault, before: Fault) -> None:
        if fault.moment == STARTING:
            self.until("every rank of a start", lambda: self.restarts() > before.restarts and self.all_here(), 200)
            time.sleep(self.chance.uniform(0, 8))
            return
        steps = self.chance.randint(2, 4)  # the watchdog gives each phase more time when it comes first

        def taken() -> bool:
            newest, count = self.start()
            return newest > before.start and count >= steps

        self.until(f"{steps} steps of a new start", taken, 240)
        self.until("every rank of it", self.all_here, 30)

    def until_restarted(self, fault: Fault) -> None:
        self.until(f"a restart after {fault.kind}", lambda: self.restarts() > fault.restarts, 200)

    def all_here(self) -> bool:
        return sorted(self.training.tasks()) == [0, 1, 2, 3]

    def saves(self) -> bool:
        return any((self.training.run.folder / "checkpoints").glob(".writing-*"))

    def until_mended(self, mend: Callable[[], None] | None, fault: Fault, *, patient: bool) -> None:
        """Bring back what was broken: at once, beside the ranks of the next start, or when that has taken a step."""
        if mend is None:
            return
        when = self.chance.choice((0, 1, 2) if patient else (0, 1))
        if when == 1:
            self.until("ranks elsewhere", self.all_here, 200)
        if when == 2:
            self.until("a step elsewhere", lambda: self.start()[0] > fault.start and self.start()[1] > 0, 240)
        mend()

    # -- the faults; each tells how to mend what it broke

    def strike(self, kind: str, tasks: dict[int, Any], names: list[str]) -> Callable[[], None] | None:
        place, _, plain = kind.rpartition(": ")
        node = names[place != "head"] if place else self.chance.choice(names)
        ranks = [process for rank, process in tasks.items()]
        cluster, job = self.cluster, str(self.training.job)
        if plain == "rank killed":
            self.chance.choice(ranks).kill()
        elif plain == "ranks of a node killed":
            half = self.chance.randint(0, 1)
            for rank in (2 * half, 2 * half + 1):
                tasks[rank].kill()
        elif plain == "slurmd and tasks killed":
            cluster.kill_daemon(node, with_jobs=True)
            return lambda: cluster.start_daemon(node)
        elif plain == "slurmd alone killed":
            cluster.kill_daemon(node)
            return lambda: cluster.start_daemon(node)
        elif plain == "power cut":
            cluster.kill_node(node)
            return lambda: cluster.start_node(node)
        elif plain == "network cut":
            cluster.cut_node(node)
            return lambda: cluster.join_node(node)
        elif plain == "preemption":
            where = cluster.places.folder
            cluster.sbatch("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1", cwd=where)
        elif plain == "requeue":
            cluster.scontrol("requeue", job)
        elif plain == "time limit near":
            self.draw_limit(job)
        elif plain == "rank hung":
            self.chance.choice(ranks).kill(signal.SIGSTOP)
        else:
            self.chance.choice(ranks).kill(signal.Signals[plain.split()[0]])
        return None

    def draw_limit(self, job: str) -> None:
        """So near that the warning is due, and far enough for the controller, which looks every half minute."""
        ran = self.cluster.job(job)["RunTime"].split(":")
        minutes = int(ran[-3][-2:]) * 60 + int(ran[-2])
        before = self.restarts()
        self.cluster.scontrol("update", f"JobId={job}", f"TimeLimit={minutes + 2}")
        self.until("a restart after the warning", lambda: self.restarts() > before, 180)
        self.cluster.scontrol("update", f"JobId={job}", "TimeLimit=60")

    # -- what it comes to

    def table(self) -> str:
        lines, launches = self.lines(), self.training.launches
        rows = [("", "fault", "", "at step", "restarts", "why, then", "steps lost", "s to a step")]
        for number, fault in enumerate(self.done):
            after = self.done[number + 1] if number + 1 < len(self.done) else None
            starts = [r for r in lines if r["event"] == "start" and r["start"] > fault.start]
            lost = [
                r["after"]["lost_steps"] or 0 for r in starts if r["after"] and (not after or r["start"] <= after.start)
            ]
            steps = [r["time"] for r in lines if r["event"] == "step" and r["start"] > fault.start]
            step = str(max((r["step"] for r in lines if r["start"] == fault.start and r["event"] == "step"), default=0))
            hit = launches[fault.launch] if 0 <= fault.launch < len(launches) else None
            why = f"{hit.why or 'cut off'}, {hit.then or 'back by SLURM'}" if hit else "?"
            wait = f"{min(steps) - fault.time:.0f}" if steps else "-"
            known = str((after.restarts if after else self.restarts()) - fault.restarts)
            row = (str(number + 1), fault.kind, fault.moment, step, known, why, str(sum(lost)), wait)
            rows.append(row)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(r, widths, strict=True)) for r in rows)

    def assert_no_survivor_wrote(self) -> None:
        """Not a line, not a checkpoint, not an end of a start that was told before; and none is left."""
        starts = [line["start"] for line in self.lines()]
        assert starts == sorted(starts), "an older start wrote behind a newer one"
        assert not self.saves(), "an unfinished checkpoint was left"
        launches = self.training.launches
        assert [x.restart for x in launches] == sorted({x.restart for x in launches}), "a start was told twice"
        self.cluster.wait_until(
            "no rank is left", lambda: not self.cluster.ranks(self.training.job), 60, self.training.job
        )


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_random_faults_of_the_cluster_lose_nothing(
    cluster: Cluster, tmp_path: Path, packed: Path, request: pytest.FixtureRequest
) -> None:
    faults = request.config.getoption("--faults")
    steps, chance = 12 * faults + 40, random.Random(0)
    overrides = (*SMALLER, f"train.steps={steps}")
    reference = Run(tmp_path / "reference", packed)
    done = reference.train(*OURS, *overrides, processes=4, timeout=300 + 4 * steps)
    assert done.returncode == 0, done.stderr

    training = Training(cluster, Run(tmp_path / "run", packed))
    options = ("--nodes=2", "--ntasks-per-node=2", "--time=60", f"--signal=B:USR1@{WARNING}")
    soak = Soak(training, schedule(faults, chance), chance)
    soak.pace("slow train.step")  # so that a fault meets the step that it is meant for
    training.submit(*options, overrides=overrides)
    try:
        soak.run()
        assert training.until_ended(300 + 4 * steps) == 0, training.log[-3000:]
    finally:
        print(f"\n{soak.table()}")
    assert_same_history(training.run, reference, steps=steps)
    soak.assert_no_survivor_wrote()
