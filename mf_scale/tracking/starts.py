"""The starts of a run, from all that tells of them, and the work that was lost between one and the next. Pure.

What a start lost are the steps it had taken beyond the step that its successor went on from. Lost and kept steps
together are the steps that were taken; the same holds for the seconds.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mf_scale.errors import EXIT_FAULT, EXIT_GUARD, EXIT_STOPPED, EXIT_USER
from mf_scale.tracking.history import Session
from mf_scale.tracking.launches import CUT_OFF, Launch
from mf_scale.tracking.progress import Slot

DONE, STOPPED, MISTAKE, GUARD, FAULT = "done", "stopped", "mistake", "guard", "fault"
KILLED, FAILED, LOST, SILENT, WENT_BACK = "killed", "failed", "cut off", "silent", "went back"
ENDS = (DONE, STOPPED, MISTAKE, GUARD, FAULT, KILLED, FAILED, LOST, SILENT, WENT_BACK)
"""How a start ends. cut off: its job script did not come to its end; silent: there was none, and no word was left."""
_BY_CODE = {0: DONE, EXIT_USER: MISTAKE, EXIT_GUARD: GUARD, EXIT_FAULT: FAULT, EXIT_STOPPED: STOPPED}
_SIGNALLED = 128
_NO_WORD = "killed, or its node was lost"


@dataclass(frozen=True)
class Start:
    """One start of a run. Times are Unix seconds; None: not known, or not yet."""

    number: int | None
    """Among the starts that came to training; None: this one did not."""
    job: str | None
    restart: int | None
    nodes: tuple[str, ...]
    ranks: int | None
    launched: float | None
    """When the job script began."""
    began: float | None
    """When it was ready for its first step."""
    first_step: float | None
    """When its first step was done."""
    last_step: float | None
    """When its last step was done."""
    heard: float
    """Its last sign of life."""
    from_step: int
    reached: int
    end: str | None
    """One of this file's words; None: it runs, or it ended without one."""
    why: str
    """A sentence on its end."""
    then: str
    """What the job script did, one of tracking.launches.THEN; empty: not known."""
    lost_steps: int | None = None
    """Steps that its successor does not go on from; None while there is none."""
    lost_images: int | None = None
    lost_seconds: float | None = None
    """What those steps took, validation and saving included."""
    down_seconds: float | None = None
    """From its end until a later start had taken a step: waiting and starting."""
    global_batch: int | None = None
    commits: Mapping[int, float] = field(default_factory=dict)
    """Step of a committed save -> when it was reached."""


def list_starts(sessions: Sequence[Session], slots: Mapping[int, Slot], launches: Sequence[Launch]) -> list[Start]:
    """All starts in their order: sessions of metrics.jsonl, and launches that never came to one."""
    last_of = {session.number: index for index, session in enumerate(sessions)}
    of_launch = [_launch_of(session, launches) for session in sessions]
    placed: list[tuple[float, Start]] = []
    for index, (session, place) in enumerate(zip(sessions, of_launch, strict=True)):
        slot = slots.get(session.number) if last_of[session.number] == index else None
        last = place not in of_launch[index + 1 :]
        start = _from_session(session, slot, None if place is None else launches[place], last=last)
        # Sessions stand in their order, whatever the clocks of their nodes say.
        placed.append((max(session.began, placed[-1][0] if placed else 0.0), start))
    placed += [(one.began, _from_launch(one)) for number, one in enumerate(launches) if number not in of_launch]
    starts = [start for _, start in sorted(placed, key=lambda pair: pair[0])]
    # One that was refused beside it says nothing of the start before it, which may train on.
    newest = max((index for index, one in enumerate(starts) if not refused(one)), default=len(starts) - 1)
    return _with_losses([_closed(one, newest=index >= newest) for index, one in enumerate(starts)])


def refused(start: Start) -> bool:
    """Whether it ended by a mistake before it came to training."""
    return start.began is None and start.end == MISTAKE


def ending(stop: Mapping[str, Any] | None, launch: Launch | None) -> tuple[str | None, str]:
    """How a start ended, by its `stop` event and its launch: one of this file's words and a sentence; None: no word."""
    told = str(stop.get("reason") or "") if stop else ""
    if launch is not None and launch.code is not None:
        code = launch.code
    elif stop is not None:
        code = int(stop.get("exit_code", 0 if told == "done" else EXIT_STOPPED))
    else:
        return None, ""
    kind = _BY_CODE.get(code, KILLED if code > _SIGNALLED else FAILED)
    script = launch.why if launch is not None else ""
    # The training knows the mistake itself; who asked it to stop is known to the job script.
    why = (script or told) if kind in (DONE, STOPPED, KILLED) else (told or script)
    return kind, why or _by_code(code)


def _by_code(code: int) -> str:
    if code <= _SIGNALLED:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(code - _SIGNALLED).name}"
    except ValueError:
        return f"killed by signal {code - _SIGNALLED}"


def _launch_of(session: Session, launches: Sequence[Launch]) -> int | None:
    """Place of the launch that a session belongs to."""
    job, restart = session.event.get("job"), session.event.get("restart")
    fitting = [n for n, one in enumerate(launches) if (one.job, one.restart) == (job, restart)]
    return fitting[-1] if fitting else None


def _from_session(session: Session, slot: Slot | None, launch: Launch | None, *, last: bool) -> Start:
    """`last`: the last session of its launch, to which its end belongs; those before went back."""
    event = session.event
    if session.rollback is not None and session.stop is None:
        end: str | None = WENT_BACK
        why = f"the loss of step {session.rollback.get('spike')} jumped"
    else:
        end, why = ending(session.stop, launch)
    steps_by = (slot.first or None) if slot else session.first_line
    hosts = event.get("hosts")
    return Start(
        number=session.number,
        job=event.get("job") or (launch.job if launch else None),
        restart=event.get("restart") if launch is None else launch.restart,
        nodes=launch.nodes if launch else tuple(hosts) if isinstance(hosts, list) else (),
        ranks=event.get("world") or (launch.ranks if launch else None),
        launched=launch.began if launch else None,
        began=session.began,
        first_step=steps_by,
        last_step=(slot.stepped or None) if slot else session.last_line,
        heard=max(session.heard, slot.last if slot else 0.0),
        from_step=session.from_step,
        reached=max(session.last_step, slot.step if slot else 0),
        end=end,
        why=why,
        then=launch.then if launch and last else "",
        global_batch=event.get("global_batch"),
        commits=session.commits,
    )


def _from_launch(launch: Launch) -> Start:
    """Of a launch that never came to training."""
    end, why = ending(None, launch)
    return Start(
        number=None,
        job=launch.job,
        restart=launch.restart,
        nodes=launch.nodes,
        ranks=launch.ranks or None,
        launched=launch.began,
        began=None,
        first_step=None,
        last_step=None,
        heard=launch.ended or launch.began,
        from_step=launch.before.step,
        reached=launch.before.step,
        end=end,
        why=why,
        then=launch.then,
    )


def _closed(start: Start, *, newest: bool) -> Start:
    """A start that has a successor is over, whatever it left unsaid."""
    if newest or start.end is not None:
        return start
    if start.launched is not None:
        return replace(start, end=LOST, why=CUT_OFF)
    return replace(start, end=SILENT, why=_NO_WORD)


@dataclass
class _Stretch:
    """Steps of one start that still hold."""

    first: int
    began: float
    last: int
    ended: float
    commits: Mapping[int, float]


def _with_losses(starts: list[Start]) -> list[Start]:
    """The starts with what each lost to its successor. Launches that never came to training neither take nor lose."""
    trained = [index for index, one in enumerate(starts) if one.began is not None]
    kept: list[_Stretch] = []
    told = list(starts)
    for place, here in enumerate(trained):
        start = starts[here]
        following = starts[trained[place + 1]] if place + 1 < len(trained) else None
        # A successor went on from there, so it was reached, whatever was lost of the files with the node.
        reached = max(start.reached, following.from_step) if following else start.reached
        began = start.began or 0.0
        ended = (start.last_step or start.heard) if reached > start.from_step else began
        kept.append(_Stretch(start.from_step, began, reached, ended, start.commits))
        if following is None:
            told[here] = replace(start, reached=reached)
            continue
        steps, seconds = reached - following.from_step, _cut(kept, following.from_step)
        told[here] = replace(
            start,
            reached=reached,
            lost_steps=steps,
            lost_images=steps * start.global_batch if start.global_batch else None,
            lost_seconds=seconds,
        )
    for index, start in enumerate(told[:-1]):
        again = next((later.first_step for later in told[index + 1 :] if later.first_step), None)
        if again is not None:
            told[index] = replace(told[index], down_seconds=max(0.0, again - start.heard))
        if start.began is None:
            told[index] = replace(told[index], lost_steps=0, lost_images=0, lost_seconds=0.0)
    return told


def _cut(kept: list[_Stretch], step: int) -> float | None:
    """Leave of the stretches what lies before `step`; the seconds that the rest took, None where nothing tells."""
    seconds: float | None = 0.0
    while kept and kept[-1].last > step:
        top = kept.pop()
        at = top.began if top.first >= step else top.commits.get(step)
        seconds = None if seconds is None or at is None else seconds + top.ended - at
        if top.first < step:
            kept.append(replace(top, last=step, ended=top.ended if at is None else at))
    return seconds
