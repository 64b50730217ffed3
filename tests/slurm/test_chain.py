"""Where requeueing is forbidden, jobs of one name that wait for each other go on one after another."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mf_scale.tracking.launches import LEFT
from tests.integration.program import Run
from tests.slurm.jobs import Training, assert_same_history
from tests.slurm.testbed import Cluster

ALONE = ("--nodes=1", "--ntasks=1")
STEPS = 12
TINY = (f"train.steps={STEPS}", "train.global_batch=2", "tracking.wandb=disabled")


def chain(cluster: Cluster, run: Run, name: str, *faults: str, overrides: tuple[str, ...] = ()) -> list[Training]:
    """A job for each of `faults` (MF_SCALE_FAULT, empty: none) on one run directory, one after the other."""
    options = (*ALONE, "--no-requeue", f"--job-name={name}", "--dependency=singleton", "--open-mode=truncate")
    jobs = [Training(cluster, run) for _ in faults]
    for number, (job, fault) in enumerate(zip(jobs, faults, strict=True)):
        log = f"--output={run.folder.parent}/{name}-{number}.log"
        job.submit(*options, log, overrides=(*TINY, *overrides), **({"MF_SCALE_FAULT": fault} if fault else {}))
    return jobs


@pytest.mark.timeout(240)
def test_the_next_job_goes_on_where_the_first_was_stopped(cluster: Cluster, tmp_path: Path, packed: Path) -> None:
    run, undisturbed = Run(tmp_path / "run", packed), Run(tmp_path / "reference", packed)
    first, second = chain(cluster, run, "large", "slow train.step", "")
    reference = Training(cluster, undisturbed).submit(*ALONE, overrides=TINY)
    first.until_step(3)
    assert cluster.state(second.job) == "PENDING"
    cluster.scancel("--batch", "--signal=USR1", first.job)
    assert first.until_ended(60) == 85, cluster.output(first.job)
    assert second.until_ended(90) == 0, cluster.output(second.job)
    assert reference.until_ended(90) == 0, reference.log

    stopped, done = second.launches
    assert (stopped.job, stopped.code, stopped.then) == (str(first.job), 85, LEFT)
    assert "the next one of its chain goes on" in cluster.output(first.job)
    assert (done.job, done.code, done.then) == (str(second.job), 0, "done")
    assert done.before.committed == done.before.step == stopped.to_step
    assert cluster.restarts(first.job) == cluster.restarts(second.job) == 0
    assert_same_history(run, undisturbed, steps=STEPS)


@pytest.mark.timeout(240)
def test_a_guard_ends_the_whole_chain_but_not_what_is_submitted_later(
    cluster: Cluster, tmp_path: Path, packed: Path
) -> None:
    run, strict = Run(tmp_path / "run", packed), ("guard.skipped_in_a_row=2",)
    first, *others = chain(cluster, run, "doomed", "nan loss", "", "", overrides=strict)
    assert first.until_ended(90) == 3, cluster.output(first.job)
    ended = time.time()
    for other in others:
        assert other.until_ended(60) == 3, cluster.output(other.job)
        said = cluster.output(other.job).strip().splitlines()
        assert len(said) == 1, said
        assert f"a guard ended this run in job {first.job}, after this job was submitted" in said[0]
    assert [(launch.job, launch.code, launch.then) for launch in first.launches] == [(str(first.job), 3, "final")]

    # SLURM keeps the time of a submission in whole seconds.
    cluster.wait_until("two seconds", lambda: time.time() > ended + 2, 10)
    (again,) = chain(cluster, run, "doomed", "", overrides=strict)
    assert again.until_ended(90) == 0, cluster.output(again.job)
    assert list(run.series("step", "loss")) == list(range(1, STEPS + 1))
