"""What the job script does when the ranks have ended. Pure.

The exit codes are the contract: 0 done; 2 a user's mistake, 3 a guard: never requeued; 85 stopped on request with its
state committed: requeued; anything else: requeued from the last commit. A start that brought the run no further is
counted, and too many of them in a row end it, whatever their codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mf_scale.errors import EXIT_FAULT, EXIT_GUARD, EXIT_STOPPED, EXIT_USER
from mf_scale.tracking.launches import DONE, FINAL, GIVEN_UP, LEFT, REQUEUED, Launch
from mf_scale.tracking.progress import Reach

_SIGNALLED = 128
_ENDED_BY_SRUN = _SIGNALLED + 15
"""srun tells the highest code of its tasks, and once one has ended badly it ends the others with TERM."""
_ASKED = "a stop asked of the ranks"


@dataclass(frozen=True)
class Decision:
    """What became of a start."""

    then: str
    """One of tracking.launches.THEN."""
    why: str
    """What ended the start."""
    ask: bool = False
    """The job script must ask SLURM for the requeue; else SLURM does it by itself, or nobody does."""
    superseded: bool = False
    """A newer start of the job runs, so this one has no say and writes nothing."""


def decide(
    code: int,
    signals: Sequence[str],
    facts: Mapping[str, str],
    restart: int,
    fruitless: int,
    cap: int,
    *,
    hung: bool = False,
) -> Decision:
    """What to do after the ranks ended with `code`.

    signals: names of those that the job script got. facts: of `scontrol show job`. restart: SLURM_RESTART_COUNT.
    fruitless: starts in a row, this one included, that brought the run no further; cap: as many end the job. hung: a
    rank's watchdog wrote its stacks; srun's own code then is that of the ranks it killed.
    """
    failed = code not in (0, EXIT_USER, EXIT_GUARD, EXIT_STOPPED)
    why = "a hang: the stacks are in hang/" if hung and failed else _why(code, signals, facts)
    if int(facts.get("Restarts", restart)) > restart:
        # SLURM counts a requeue of its own at once, while the start that it ends is still completing.
        if facts.get("JobState") in ("RUNNING", "CONFIGURING", "SUSPENDED"):
            return Decision(FINAL, "a newer start of this job runs", superseded=True)
        # A head node without its daemon hears of nothing, while the ranks on the others are told to stop.
        told = "TERM" in signals or why == _ASKED
        return Decision(REQUEUED, "SLURM requeued the job" if told else why)
    # scancel is final: SLURM would bring a job that completes back to life if it were asked to requeue it. The time
    # limit alone ends a job that nobody wanted to end.
    cancelled = _cancelled(signals, facts)
    if code == 0 or cancelled or code in (EXIT_USER, EXIT_GUARD):
        return Decision(FINAL if code else DONE, why)
    if fruitless >= cap:
        return Decision(GIVEN_UP, why)
    forbidden = facts.get("Requeue") == "0"
    return Decision(LEFT if forbidden else REQUEUED, why, ask=not forbidden)


def _why(code: int, signals: Sequence[str], facts: Mapping[str, str]) -> str:
    plain = {
        0: "done",
        EXIT_USER: "a mistake to be mended",
        EXIT_GUARD: "a guard of the run",
        EXIT_FAULT: "a fault of the surroundings (exit code 75)",
    }
    if code in plain:
        return plain[code]
    if code == EXIT_STOPPED or "TERM" in signals:
        return _stopped(signals, facts)
    if code == _ENDED_BY_SRUN:
        return "a rank failed or was killed, and srun ended the others"
    return (
        f"a rank was killed by signal {code - _SIGNALLED}" if code > _SIGNALLED else f"a rank failed (exit code {code})"
    )


def _cancelled(signals: Sequence[str], facts: Mapping[str, str]) -> bool:
    """SLURM has ended the job, and not for its time: it no longer runs. A node that shuts down sends TERM as well."""
    return "TERM" in signals and facts.get("JobState") != "RUNNING" and facts.get("Reason") != "TimeLimit"


def _stopped(signals: Sequence[str], facts: Mapping[str, str]) -> str:
    if _cancelled(signals, facts):
        return "scancel"
    if "TERM" in signals:
        return "the time limit" if facts.get("Reason") == "TimeLimit" else "a TERM to the job script"
    if "USR1" in signals:
        return "USR1 ahead of the time limit"
    preempted = facts.get("PreemptTime", "None") not in ("None", "Unknown", "")
    return "a preemption" if preempted else _ASKED


def fruitless_starts(launches: Sequence[Launch], *, since: float, now: Reach) -> int:
    """Starts at the end of `launches` in a row that brought the run no further than the one before; it is at `now`.

    Only those begun at or after `since` (the job's submission) count: whoever submits again has seen to it.
    """
    count = 0
    for launch in reversed(launches):
        if launch.began < since or now.further_than(launch.before):
            break
        if launch.code == EXIT_USER:  # refused: it took nothing from the job that trains
            continue
        count, now = count + 1, launch.before
    return count
