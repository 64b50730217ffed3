"""What a run is doing: one word and one sentence, from its starts and from who holds its lock. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mf_scale.tracking import launches, starts
from mf_scale.tracking.alive import Holder
from mf_scale.tracking.starts import Start

ALIVE_SECONDS = 600.0
"""Without a sign of life for as long a training counts as ended where nothing else tells: by default the watchdog ends
a rank that hangs after this time."""
NOT_STARTED, STARTING, RUNNING, QUEUED, REQUEUED = "not started", "starting", "running", "queued", "requeued"
DONE, STOPPED, GUARD, MISTAKE, GIVEN_UP = "done", "stopped", "guard", "mistake", "given up"
ENDED, FAILED, SILENT = "ended", "failed", "silent"
STATES = (
    NOT_STARTED, STARTING, RUNNING, QUEUED, REQUEUED, DONE, STOPPED, GUARD, MISTAKE, GIVEN_UP, ENDED, FAILED, SILENT,
)  # fmt: skip
"""ended: SLURM ended the job (scancel, or a requeue of its own). silent: no word of an end, and no sign of life."""
_IN_JOB = ("RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED")
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESIZING")


@dataclass(frozen=True)
class State:
    """What a run is doing."""

    word: str
    """One of STATES."""
    sentence: str
    since: float | None
    """Unix seconds since which it is so."""

    @property
    def lives(self) -> bool:
        """It goes on without anybody's help."""
        return self.word in (STARTING, RUNNING, QUEUED, REQUEUED)


def judge_state(told: Sequence[Start], holder: Holder | None, queue: str | None, now: float) -> State:
    """The state of a run with the starts `told`; `queue`: "STATE REASON" of its job, "" if SLURM does not know it."""
    told = _without_refused(told, holder)
    newest = told[-1] if told else None
    in_queue, _, reason = (queue or "").partition(" ")
    if in_queue in _WAITING:
        job = f" (job {newest.job})" if newest and newest.job else ""
        detail = f": {reason}" if reason.strip("()") not in ("", "None") else ""
        return State(QUEUED, f"waiting in the queue{job}{detail}", newest.heard if newest and newest.end else None)
    if newest is None or (newest.end and holder is not None and holder.lives and holder.since > newest.heard):
        return _without_start(holder)
    if newest.end is not None and in_queue in _IN_JOB and newest.end not in (starts.DONE, starts.GUARD, starts.MISTAKE):
        return State(STARTING, "between two starts: its job runs", newest.heard)
    if newest.end is not None:
        return _ended(told, newest)
    return _open(newest, holder, in_queue, now)


def _without_refused(told: Sequence[Start], holder: Holder | None) -> Sequence[Start]:
    """Without the newest starts that never trained because another one, which still does, holds the run."""
    kept = list(told)
    while len(kept) > 1 and holder is not None and holder.lives:
        newest = kept[-1]
        if not starts.refused(newest) or holder.since > (newest.launched or newest.heard):
            break
        kept.pop()
    return kept


def _without_start(holder: Holder | None) -> State:
    if holder is None:
        return State(NOT_STARTED, "nothing tells of a start", None)
    if holder.lives is False:
        return State(SILENT, "ended before its first start was told", holder.since)
    return State(STARTING, f"starting on {holder.host}", holder.since)


def _open(newest: Start, holder: Holder | None, in_queue: str, now: float) -> State:
    """Of a start that has no end yet."""
    where = _on(newest.nodes)
    if in_queue in _IN_JOB or (holder is not None and holder.lives):
        lives: bool | None = True
    elif in_queue or (holder is not None and holder.lives is False and newest.began is not None):
        lives = False
    else:
        lives = None
    if lives is False or (lives is None and now - newest.heard > ALIVE_SECONDS):
        return State(SILENT, "ended without a word: killed, or its node was lost", newest.heard)
    quiet = now - newest.heard > ALIVE_SECONDS
    if newest.first_step is None:
        return State(STARTING, f"starting{where}", newest.launched or newest.began)
    if quiet:
        return State(RUNNING, f"running{where}, without a sign of life", newest.heard)
    return State(RUNNING, f"running{where}", newest.began)


def _ended(told: Sequence[Start], newest: Start) -> State:
    why, at = newest.why, newest.heard
    by_script = {
        launches.REQUEUED: State(REQUEUED, f"requeued after {_inside(why)}, waiting for its next start", at),
        launches.GIVEN_UP: State(GIVEN_UP, f"given up after {_fruitless(told)}; the last one: {why}", at),
        launches.LEFT: State(STOPPED, f"left to the next job of its chain after {_inside(why)}", at),
    }
    if newest.end == starts.DONE:
        return State(DONE, "done", at)
    if newest.end in (starts.GUARD, starts.MISTAKE):
        word, who = (GUARD, "stopped by a guard") if newest.end == starts.GUARD else (MISTAKE, "stopped by a mistake")
        return State(word, f"{who}: {why}", at)
    if newest.then in by_script:
        return by_script[newest.then]
    if newest.then == launches.FINAL:
        return State(ENDED, why, at)
    if newest.end == starts.STOPPED:
        return State(STOPPED, f"stopped on request: {why}", at)
    return State(FAILED, f"failed: {why}", at)


def _fruitless(told: Sequence[Start]) -> str:
    """The starts of its last job that came no further than the run had been."""
    count = 0
    for place in range(len(told) - 1, -1, -1):
        before = max((one.reached for one in told[:place]), default=0)
        if told[place].reached > before or told[place].job != told[-1].job:
            break
        count += 1
    return "a start that came no further" if count == 1 else f"{count} starts that came no further"


def _on(nodes: Sequence[str]) -> str:
    if not nodes:
        return ""
    return f" on {', '.join(nodes[:4])}" + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")


def _inside(why: str) -> str:
    """A sentence within another."""
    return why.rstrip(".")
