"""What becomes of a job: exit codes as a contract, scancel final, a cap on starts that bring nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mf_scale.cluster.requeue import decide, fruitless_starts
from mf_scale.tracking.launches import Launch
from mf_scale.tracking.progress import Reach

RUNNING = {"JobState": "RUNNING", "Reason": "None", "Restarts": "0", "Requeue": "1", "PreemptTime": "None"}
ENDING = {**RUNNING, "JobState": "COMPLETING"}


@pytest.mark.parametrize(
    ("code", "signals", "facts", "then", "ask", "why"),
    [
        (0, [], RUNNING, "done", False, "done"),
        (2, [], RUNNING, "final", False, "a mistake"),
        (3, [], RUNNING, "final", False, "a guard"),
        (85, ["USR1"], RUNNING, "requeued", True, "USR1 ahead of the time limit"),
        (85, [], {**RUNNING, "PreemptTime": "2026-01-01T00:00:00"}, "requeued", True, "a preemption"),
        (85, [], RUNNING, "requeued", True, "a stop asked of the ranks"),
        (75, [], RUNNING, "requeued", True, "a fault of the surroundings"),
        (137, [], RUNNING, "requeued", True, "killed by signal 9"),
        (143, [], RUNNING, "requeued", True, "a rank failed or was killed, and srun ended the others"),
        (1, [], RUNNING, "requeued", True, "a rank failed (exit code 1)"),
        (85, ["TERM"], ENDING, "final", False, "scancel"),
        (137, ["TERM"], ENDING, "final", False, "scancel"),
        (85, ["USR1", "TERM"], ENDING, "final", False, "scancel"),
        (85, ["TERM"], {**ENDING, "Reason": "TimeLimit"}, "requeued", True, "the time limit"),
        (85, ["TERM"], {**ENDING, "Restarts": "1"}, "requeued", False, "SLURM requeued the job"),
        (85, [], {**ENDING, "Restarts": "1"}, "requeued", False, "SLURM requeued the job"),
        (137, [], {**ENDING, "Restarts": "1"}, "requeued", False, "killed by signal 9"),
        (85, ["USR1"], {**RUNNING, "Requeue": "0"}, "left to the next job", False, "USR1"),
        (85, ["TERM"], RUNNING, "requeued", True, "a TERM to the job script"),  # a node that shuts down
        (143, [], RUNNING, "requeued", True, "srun ended the others"),
        (0, ["TERM"], ENDING, "done", False, "done"),
    ],
)
def test_exit_codes_and_signals_decide(code, signals, facts, then, ask, why) -> None:
    decision = decide(code, signals, facts, restart=0, fruitless=1, cap=5)
    assert (decision.then, decision.ask, decision.superseded) == (then, ask, False)
    assert why in decision.why


def test_a_hang_is_told_whatever_code_srun_made_of_it() -> None:
    for code in (75, 137, 143):
        decision = decide(code, [], RUNNING, restart=0, fruitless=1, cap=5, hung=True)
        assert (decision.then, decision.why) == ("requeued", "a hang: the stacks are in hang/")
    assert decide(85, ["USR1"], RUNNING, restart=0, fruitless=1, cap=5, hung=True).why == "USR1 ahead of the time limit"


def test_a_start_whose_job_runs_again_elsewhere_has_no_say() -> None:
    for code in (0, 85, 137):
        decision = decide(code, [], {**RUNNING, "Restarts": "2"}, restart=1, fruitless=0, cap=5)
        assert decision.superseded and not decision.ask


def test_too_many_starts_that_bring_nothing_end_the_job_whatever_their_codes() -> None:
    for code in (1, 75, 85, 137):
        assert decide(code, [], RUNNING, restart=0, fruitless=4, cap=5).then == "requeued"
        given_up = decide(code, [], RUNNING, restart=0, fruitless=5, cap=5)
        assert given_up.then == "given up" and not given_up.ask


def launch(began: float, step: int, committed: int = 0) -> Launch:
    return Launch("7", 0, began, 0, ("node1",), 1, Reach(step, committed), ())


def test_only_starts_in_a_row_without_progress_count() -> None:
    count = fruitless_starts
    history = [launch(1, 0), launch(2, 9), launch(3, 9), launch(4, 9)]
    assert count(history, since=0, now=Reach(9, 0)) == 3
    assert count(history, since=0, now=Reach(10, 0)) == 0
    assert count(history, since=3, now=Reach(9, 0)) == 2  # submitted again behind the second
    assert count([], since=0, now=Reach(0, 0)) == 0
    assert count([launch(1, 0)], since=0, now=Reach(0, 0)) == 1


def test_a_refused_start_does_not_count() -> None:
    """Another job on the same run, refused by the lock, takes nothing from the one that trains."""
    refused = replace(launch(2, 9), code=2)
    assert fruitless_starts([launch(1, 9), refused, refused], since=0, now=Reach(9, 0)) == 1


def test_a_commit_below_the_furthest_step_is_progress() -> None:
    """Killed at 9 before a commit, a start goes on from 4, commits 7 and is killed: it brought the run further."""
    history = [launch(1, 0, 0), launch(2, 9, 4), launch(3, 9, 7)]
    assert fruitless_starts(history, since=0, now=Reach(9, 7)) == 1
    assert fruitless_starts(history, since=0, now=Reach(9, 8)) == 0
