"""The starts of a run on its report page: a table, a sentence on what they cost, and marks on the curves."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from mf_scale.tracking.charts import Mark
from mf_scale.tracking.console import duration
from mf_scale.tracking.starts import Start
from mf_scale.tracking.status import RunStatus
from mf_scale.tracking.status_text import start_end

_UNKNOWN = "-"


def start_rows(starts: Sequence[Start]) -> list[dict[str, Any]]:
    """What the table shows of each start."""
    return [
        {
            "number": _UNKNOWN if start.number is None else start.number,
            "began": _utc(start.launched or start.began),
            "job": _UNKNOWN if start.job is None else f"{start.job}.{start.restart or 0}",
            "ranks": _UNKNOWN if start.ranks is None else start.ranks,
            "nodes": ", ".join(start.nodes[:4]) + (f" and {len(start.nodes) - 4} more" if len(start.nodes) > 4 else ""),
            "from_step": start.from_step if start.number is not None else None,
            "reached": start.reached,
            "end": start_end(start),
            "lost_steps": start.lost_steps,
            "lost_time": _span(start.lost_seconds) if start.lost_steps else "",
            "down": _span(start.down_seconds),
        }
        for start in starts
    ]


def lost_sentence(status: RunStatus) -> str:
    """What the restarts cost; empty where there was none."""
    if not status.restarts:
        return ""
    took = f" ({duration(status.lost_seconds)})" if status.lost_steps and status.lost_seconds is not None else ""
    restarts = "1 restart" if status.restarts == 1 else f"{status.restarts:,} restarts"
    steps = "1 step" if status.lost_steps == 1 else f"{status.lost_steps:,} steps"
    return f"{restarts} lost {steps}{took}; {duration(status.down_seconds)} passed until it went on."


def start_marks(starts: Sequence[Start]) -> list[Mark]:
    """A mark where each start but the first went on, with what the one before it ended by."""
    trained = [start for start in starts if start.number is not None]
    marks = []
    for before, start in pairwise(trained):
        lost = f"; {before.lost_steps:,} steps lost" if before.lost_steps else ""
        text = f"start {start.number} goes on from step {start.from_step:,} after: {start_end(before)}{lost}"
        marks.append(Mark(start.from_step, str(start.number), text))
    return marks


def _utc(at: float | None) -> str:
    return _UNKNOWN if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def _span(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)
