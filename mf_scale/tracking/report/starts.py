"""The starts of a run on its report page: a table, a sentence on what they cost, and marks on the curves."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise

from mf_scale.tracking.console import duration
from mf_scale.tracking.report.charts import RESUME, ROLLBACK, Mark
from mf_scale.tracking.report.table import Cell, Column, Table, count
from mf_scale.tracking.starts import WENT_BACK, Start
from mf_scale.tracking.status import RunStatus
from mf_scale.tracking.status_text import start_end

_UNKNOWN = "-"
_COLUMNS = (
    Column("start", text=True),
    Column("began, UTC", text=True, wide=True),
    Column("job", text=True),
    Column("ranks"),
    Column("steps"),
    Column("lost"),
    Column("until going on", about="waiting and starting, up to a step again"),
    Column("end", text=True, wide=True),
)


def start_table(starts: Sequence[Start]) -> Table | None:
    """Every start of the run; None without one."""
    rows: list[list[Cell | str]] = [
        [
            f"start {_UNKNOWN if start.number is None else start.number}",
            _utc(start.launched or start.began),
            _UNKNOWN if start.job is None else f"{start.job}.{start.restart or 0}",
            Cell(_UNKNOWN if start.ranks is None else str(start.ranks), small=_nodes(start.nodes)),
            _UNKNOWN if start.number is None else f"{count(start.from_step)}\u00a0→\u00a0{count(start.reached)}",
            Cell(
                "" if start.lost_steps is None else count(start.lost_steps),
                small=_span(start.lost_seconds) if start.lost_steps else "",
            ),
            _span(start.down_seconds),
            start_end(start),
        ]
        for start in starts
    ]
    caption = "1 start" if len(rows) == 1 else f"{count(len(rows))} starts"
    return Table("starts-table", caption, _COLUMNS, rows) if rows else None


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
        kind = ROLLBACK if before.end == WENT_BACK else RESUME
        marks.append(Mark(start.from_step, str(start.number), text, kind))
    return marks


def _nodes(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")


def _utc(at: float | None) -> str:
    return _UNKNOWN if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def _span(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds).replace(" ", "\u00a0")
