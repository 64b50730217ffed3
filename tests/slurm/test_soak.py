"""A schedule of random faults of a cluster on one job: `make soak FAULTS=20`."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.program import Run
from tests.slurm.faults import NEAR_LIMIT, RUNS_ON, SAVING, STARTING, Fault, Mend, schedule, strike
from tests.slurm.jobs import OURS, Training, assert_same_history
from tests.slurm.settings import Settings
from tests.slurm.testbed import Cluster

SMALLER = ("train.global_batch=4", "train.hang_timeout=20", "launch.fruitless_starts=20")
AT_ONCE, BESIDE, AFTER = "at once", "beside the next start's ranks", "after the next start's first step"


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

    def steps_after(self, restarts: int) -> list[float]:
        """Unix seconds of the steps that were taken by starts with more restarts than that."""
        lines = self.lines()
        later = {line["start"] for line in lines if line["event"] == "start" and line["restart"] > restarts}
        return [line["time"] for line in lines if line["event"] == "step" and line["start"] in later]

    def restarts(self) -> int:
        return self.cluster.restarts(self.training.job)

    def all_here(self) -> bool:
        return sorted(self.training.tasks()) == [0, 1, 2, 3]

    def saves(self) -> bool:
        return any((self.training.run.folder / "checkpoints").glob(".writing-*"))

    # -- the schedule

    def run(self) -> None:
        restarts = -1
        for number, fault in enumerate(self.faults):
            self.until_moment(fault.moment, restarts)
            tasks, nodes = self.training.tasks(), self.cluster.nodes_of(self.training.job)
            fault.restarts, fault.launch = self.restarts(), len(self.training.launches) - 1
            restarts = fault.restarts
            if fault is self.faults[-1]:
                self.pace("")
            if fault.moment == SAVING:
                self.until("a save", self.saves, 90)
            fault.time = time.time()
            self.done.append(fault)
            mend = strike(self.cluster, self.training.job, fault.kind, tasks, nodes, self.chance)
            self.until_restarted(fault)
            starting = number + 1 < len(self.faults) and self.faults[number + 1].moment == STARTING
            if mend is not None:
                self.until_mended(mend, fault, (AT_ONCE, BESIDE) if starting else (AT_ONCE, BESIDE, AFTER))

    def pace(self, fault: str) -> None:
        """What the steps of the next starts are slowed down by (empty: nothing)."""
        for node in self.cluster.nodes:
            self.cluster.task_environment(node, **({"MF_SCALE_FAULT": fault} if fault else {}))

    def until_moment(self, moment: str, restarts: int) -> None:
        """Until a start with more restarts than that has all its ranks, or has taken some steps."""
        if moment == STARTING:
            self.until("every rank of a start", lambda: self.restarts() > restarts and self.all_here(), 200)
            time.sleep(self.chance.uniform(0, 8))
            return
        steps = self.chance.randint(2, 4)  # the watchdog gives each phase more time when it comes first
        self.until(f"{steps} steps of a new start", lambda: len(self.steps_after(restarts)) >= steps, 240)
        self.until("every rank of it", self.all_here, 30)

    def until_restarted(self, fault: Fault) -> None:
        self.until(f"a restart after {fault.kind}", lambda: self.restarts() > fault.restarts, 200)

    def until_mended(self, mend: Mend, fault: Fault, whens: tuple[str, ...]) -> None:
        """Bring back what was broken."""
        if fault.kind == NEAR_LIMIT:  # which the next start would meet as well
            whens = (AT_ONCE,)
        when = whens[-1] if fault.kind == RUNS_ON else self.chance.choice(whens)
        if when == BESIDE:
            self.until("ranks elsewhere", self.all_here, 200)
        if when == AFTER:
            self.until("a step elsewhere", lambda: self.steps_after(fault.restarts), 240)
        mend()

    def until(self, what: str, true: Callable[[], object], timeout: float) -> None:
        """As wait_until, but at its end as soon as the job has ended for good."""
        ended: list[float] = []

        def over() -> bool:
            gone = not self.cluster.squeue("%i", f"--jobs={self.training.job}")
            ended[:] = [*ended, time.monotonic()] if gone else []
            assert not ended or ended[-1] - ended[0] < 10, f"the job ended before: {what}\n{self.training.log[-3000:]}"
            return bool(true())

        self.cluster.wait_until(what, over, timeout, self.training.job)

    # -- what it comes to

    def lost_by(self, fault: Fault) -> int:
        """Steps that the start which was hit had taken, and that had to be taken again."""
        lost, hit = 0, 0
        for start in (line for line in self.lines() if line["event"] == "start"):
            ended_by = next((one for one in self.done if one.restarts >= hit), None)
            if ended_by is fault and start["after"]:
                lost += start["after"]["lost_steps"] or 0
            hit = start["restart"]
        return lost

    def table(self) -> str:
        lines, launches = self.lines(), self.training.launches
        rows = [("", "fault", "", "at step", "restarts", "why, then", "steps lost", "s to a step")]
        known = [*(fault.restarts for fault in self.done[1:]), self.restarts()]
        for number, fault in enumerate(self.done):
            before = [line["step"] for line in lines if line["event"] == "step" and line["time"] < fault.time]
            hit = launches[fault.launch] if 0 <= fault.launch < len(launches) else None
            why = f"{hit.why or 'cut off'}, {hit.then or 'back by SLURM'}" if hit else "?"
            steps = self.steps_after(fault.restarts)
            wait = f"{min(steps) - fault.time:.0f}" if steps else "-"
            numbers = (str(before[-1] if before else 0), str(known[number] - fault.restarts))
            rows.append((str(number + 1), fault.kind, fault.moment, *numbers, why, str(self.lost_by(fault)), wait))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(r, widths, strict=True)) for r in rows)

    def assert_no_survivor_wrote(self) -> None:
        """Not a line, not a checkpoint, not an end of a start that was told before; and none is left."""
        starts = [line["start"] for line in self.lines()]
        assert starts == sorted(starts), "an older start wrote behind a newer one"
        assert not self.saves(), "an unfinished checkpoint was left"
        told = [launch.restart for launch in self.training.launches]
        assert told == sorted(set(told)), "a start was told twice"
        job = self.training.job
        self.cluster.wait_until("no rank is left", lambda: not self.cluster.ranks(job), 60, job)


@pytest.fixture
def cluster(cluster_folder: Path) -> Iterator[Cluster]:
    """Four nodes: both of a job may be lost at once, and it goes on elsewhere."""
    with Cluster(cluster_folder / "soak", Settings(nodes=4)) as cluster:
        yield cluster


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_random_faults_of_the_cluster_lose_nothing(
    cluster: Cluster, tmp_path: Path, packed: Path, request: pytest.FixtureRequest
) -> None:
    faults = request.config.getoption("--faults")
    steps, chance = 8 * faults + 60, random.Random(0)
    overrides = (*SMALLER, f"train.steps={steps}")
    reference = Run(tmp_path / "reference", packed)
    done = reference.train(*OURS, *overrides, processes=4, timeout=300 + 4 * steps)
    assert done.returncode == 0, done.stderr

    training = Training(cluster, Run(tmp_path / "run", packed))
    soak = Soak(training, schedule(faults, chance), chance)
    soak.pace("slow train.step")  # so that a fault meets the step that it is meant for
    options = ("--nodes=2", "--ntasks-per-node=2", "--time=60", "--signal=B:USR1@100")
    training.submit(*options, overrides=overrides)
    try:
        soak.run()
        assert training.until_ended(300 + 4 * steps) == 0, training.log[-3000:]
    finally:
        print(f"\n{soak.table()}")
    assert_same_history(training.run, reference, steps=steps)
    soak.assert_no_survivor_wrote()
