"""A job comes back by itself, and its history is the undisturbed run's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.program import Run
from tests.slurm.jobs import ENVIRONMENT, OURS, STEPS, Training, assert_same_history
from tests.slurm.testbed import Cluster

TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Run:
    """The undisturbed run: four ranks of this machine, without SLURM."""
    run = Run(tmp_path_factory.mktemp("reference") / "run", packed)
    done = run.train(*OURS, f"train.steps={STEPS}", processes=4, timeout=240)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.timeout(600)
def test_preempted_requeued_killed_and_cut_off_it_loses_nothing(
    cluster: Cluster, tmp_path: Path, packed: Path, reference: Run
) -> None:
    training = Training(cluster, Run(tmp_path / "run", packed)).submit(*TWO_BY_TWO)
    job = training.job

    training.until_step(3)
    cluster.sbatch("--partition=high", "--nodes=3", "--exclusive", "--wrap=sleep 1", cwd=tmp_path)
    training.until_started(2)
    cluster.scontrol("requeue", str(job))
    training.until_started(3)
    cluster.ranks(job)[3].kill()
    training.until_started(4)
    head = cluster.job(job)["BatchHost"]
    cluster.cut_node(head)
    training.until_started(5, 180)
    assert head not in cluster.nodes_of(job)
    assert training.until_ended() == 0, training.log
    cluster.join_node(head)

    assert_same_history(training.run, reference)
    starts = [r for r in training.run.records() if r["event"] == "start"]
    assert {start["job"] for start in starts} == {str(job)}
    ends = {(launch.why, launch.then) for launch in training.launches}
    assert ends >= {
        ("a preemption", "requeued"),
        ("SLURM requeued the job", "requeued"),
        ("a rank was killed by signal 9", "requeued"),
        ("", ""),  # of the start that was cut off nobody could tell
        ("done", "done"),
    }
    assert training.log.count("resuming") >= 4, "the log is appended to"
    tracked = {folder.name.rpartition("-")[2] for folder in training.run.folder.glob("wandb/offline-run-*")}
    assert tracked == {(training.run.folder / "wandb/run-id").read_text().strip()}, "one W&B run"
    # A preemption and a requeue with their grace lose nothing.
    assert [start["after"]["lost_steps"] for start in starts[1:3]] == [0, 0]


@pytest.mark.timeout(400)
def test_the_time_limit_is_met_ahead_of_it(cluster: Cluster, tmp_path: Path, packed: Path, reference: Run) -> None:
    training = Training(cluster, Run(tmp_path / "run", packed))
    # How long a start takes here is anybody's guess, so the limit is drawn near once there are steps to lose.
    training.submit(*TWO_BY_TWO, "--signal=B:USR1@100", MF_SCALE_FAULT="slow train.step")
    training.until_step(3)
    cluster.scontrol("update", f"JobId={training.job}", "TimeLimit=2")
    cluster.wait_start(training.job, 1, 120)
    cluster.scontrol("update", f"JobId={training.job}", "TimeLimit=10")
    assert training.until_ended(240) == 0, training.log
    assert_same_history(training.run, reference)
    first, second = training.launches
    assert (first.why, first.code, first.then) == ("USR1 ahead of the time limit", 85, "requeued")
    assert second.before.step >= 3 and second.before.committed == second.before.step


@pytest.mark.timeout(300)
def test_a_lost_node_leaves_a_smaller_allocation(
    cluster: Cluster, tmp_path: Path, packed: Path, reference: Run
) -> None:
    spare, lost = cluster.nodes[2], cluster.nodes[1]
    cluster.scontrol("update", f"NodeName={spare}", "State=DRAIN", "Reason=test")
    try:
        # Without --ntasks-per-node: with it SLURM holds the job to the number of tasks that it had at first.
        options = ("--nodes=1-2", "--exclusive", "--gpus-per-node=2")
        # Of the environment only this goes into the job, and by itself srun would hand on no more to the ranks.
        only = "--export=" + ",".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        training = Training(cluster, Run(tmp_path / "run", packed)).submit(*options, only)
        training.until_step(6)
        for rank in cluster.ranks(training.job).values():
            assert rank.environment()["PYTHONPATH"].startswith(str(training.run.folder / "code"))
        cluster.kill_daemon(lost, with_jobs=True)
        cluster.wait_start(training.job, 1, 120)
        assert cluster.nodes_of(training.job) == [cluster.nodes[0]]
        assert training.until_ended() == 0, training.log
    finally:
        cluster.scontrol("update", f"NodeName={spare}", "State=RESUME")
    assert_same_history(training.run, reference, exactly=False)
    assert [launch.ranks for launch in training.launches] == [4, 2]


@pytest.mark.timeout(300)
def test_what_brings_a_run_no_further_is_given_up_and_scancel_is_final(
    cluster: Cluster, tmp_path: Path, packed: Path
) -> None:
    hopeless = Training(cluster, Run(tmp_path / "hopeless", packed)).submit(
        "--nodes=1", "--ntasks=1", overrides=("launch.fruitless_starts=2",), MF_SCALE_FAULT="kill train.first"
    )
    fine = Training(cluster, Run(tmp_path / "fine", packed)).submit("--nodes=1", "--ntasks=1")
    fine.until_step(3)
    cluster.scancel(fine.job)
    fine.until_ended()
    assert cluster.state(fine.job) == "CANCELLED"
    assert fine.launches[-1].then == "final"
    assert hopeless.until_ended() == 137
    assert [launch.then for launch in hopeless.launches] == ["requeued", "given up"], hopeless.log
    assert "2 starts in a row brought the run no further than step 0" in hopeless.log
    stop = [r for r in fine.run.records() if r["event"] == "stop"][-1]
    assert fine.run.state(stop["step"])["step"] == stop["step"]
    assert cluster.restarts(fine.job) == 0
