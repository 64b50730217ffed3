"""Whether a job without a run of its own (launch/evaluate.sh, launch/pack.sh) is started again. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mf_scale.errors import EXIT_FAULT, EXIT_GUARD, EXIT_STOPPED, EXIT_USER

MOST_FAULTS = 10
"""Starts of a job after which a fault of the surroundings does not bring it back any more."""


def start_again(
    code: int, signals: Sequence[str], facts: Mapping[str, str], restart: int, *, resumes: bool
) -> tuple[bool, str]:
    """Whether the job script must ask SLURM for a requeue, and a sentence on why (empty: nothing to say).

    signals: names of those that the job script got. facts: of `scontrol show job`. resumes: the next start goes on
    where this one stopped, so that running out of time is no reason to give up.
    """
    if code in (0, EXIT_USER, EXIT_GUARD):
        return False, ""
    if int(facts.get("Restarts", restart)) > restart:
        return False, "SLURM brings the job back"
    out_of_time = "USR1" in signals
    if "TERM" in signals:
        # scancel is final: SLURM would bring even a job that completes back to life if it were asked to requeue it.
        if facts.get("Reason") != "TimeLimit" and facts.get("JobState") != "RUNNING":
            return False, "cancelled"
        out_of_time = True
    elif facts.get("JobState") != "RUNNING":
        return False, f"the job is {facts.get('JobState', 'gone')}"
    if out_of_time:
        return _out_of_time(facts, resumes)
    return _after_failure(code, facts, restart)


def _after_failure(code: int, facts: Mapping[str, str], restart: int) -> tuple[bool, str]:
    if facts.get("PreemptTime", "None") not in ("None", "Unknown", ""):
        return _unless_forbidden(facts, "preempted")
    if code not in (EXIT_FAULT, EXIT_STOPPED):
        return False, ""
    if restart >= MOST_FAULTS:
        return False, f"exit code {code} after {restart} restarts: given up"
    return _unless_forbidden(facts, f"exit code {code}")


def _out_of_time(facts: Mapping[str, str], resumes: bool) -> tuple[bool, str]:
    if resumes:
        return _unless_forbidden(facts, "out of time")
    return False, "out of time, and it would begin anew: ask for a longer --time or for more nodes"


def _unless_forbidden(facts: Mapping[str, str], why: str) -> tuple[bool, str]:
    if facts.get("Requeue") == "0":
        return False, f"{why}; requeueing is not allowed for this job: submit the same command again"
    return True, f"{why}: the job is requeued"
