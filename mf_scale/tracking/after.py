"""What a start tells of the one before: how that ended, and what of its work was lost."""

from __future__ import annotations

import time
from typing import Any

from mf_scale.rundir import RunDir
from mf_scale.tracking.history import Session, read_history
from mf_scale.tracking.launches import read_launches
from mf_scale.tracking.progress import read_progress
from mf_scale.tracking.starts import list_starts


def what_came_before(
    run: RunDir, *, start: int, step: int, job: str | None, restart: int | None
) -> dict[str, Any] | None:
    """The `after` of the `start` event of start `start` (restart `restart` of `job`), which goes on from `step`.

    Called before that event is written. {"end", "reason", "reached", "lost_steps", "lost_seconds", "seconds_down"} of
    the start before, words of tracking.starts; None where there was none that came to training.
    """
    now = time.time()
    sessions = read_history(run.metrics).sessions
    event = {"event": "start", "step": step, "time": now, "job": job, "restart": restart}
    told = list_starts([*sessions, Session(start, event, step, now)], read_progress(run), read_launches(run))
    trained = [one for one in told if one.number is not None]
    if len(trained) < 2:
        return None
    before = trained[-2]
    return {
        "end": before.end,
        "reason": before.why,
        "reached": before.reached,
        "lost_steps": before.lost_steps,
        "lost_seconds": None if before.lost_seconds is None else round(before.lost_seconds, 3),
        "seconds_down": round(max(0.0, now - before.heard), 3),
    }
