"""launches.jsonl: what the job script did around a run, one JSON object a line, appended by the job script alone.

metrics.jsonl is the training's word on its steps; this is the launcher's on starts that may never have come to a step.

    {"event": "launch", "time", "job", "restart", "submitted", "nodes", "ranks", "step", "committed", "notes"}
    {"event": "end", "time", "job", "restart", "code", "signals", "step", "why", "then"}

`step` is the furthest step that the run had reached by then, `committed` that of its newest checkpoint, `why` a
sentence on what ended the start, `then` one of THEN. A launch without an end was cut off: its node was lost, or SLURM
killed the job script.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mf_scale.rundir import RunDir, disk_errors
from mf_scale.tracking.progress import Reach

LAUNCHES = "launches.jsonl"
REQUEUED, DONE, FINAL, GIVEN_UP, LEFT = "requeued", "done", "final", "given up", "left to the next job"
THEN = (REQUEUED, DONE, FINAL, GIVEN_UP, LEFT)
"""What the job script did at the end of a start: requeued the job; nothing, as the run is done; nothing, as it must not
go on (a mistake, a guard, scancel); gave it up after too many fruitless starts; left it to the next job of a chain."""
CUT_OFF = "cut off: the node was lost, or SLURM killed the job script"


@dataclass(frozen=True)
class Launch:
    """One start of a job on a run, and how it ended."""

    job: str
    restart: int
    began: float
    """Unix seconds."""
    submitted: float
    """Unix seconds at which the job was submitted; 0 where SLURM does not tell."""
    nodes: tuple[str, ...]
    ranks: int
    before: Reach
    """How far the run had come."""
    notes: tuple[str, ...]
    ended: float | None = None
    code: int | None = None
    """Exit code of the ranks; None: cut off, or still running."""
    to_step: int | None = None
    """The furthest step the run had reached when it ended."""
    why: str = ""
    then: str = ""


def append_launch(run: RunDir, event: str, **values: Any) -> None:
    """Append one line; raises UserError where it cannot be written."""
    line = json.dumps({"event": event, "time": round(time.time(), 3), **values}, ensure_ascii=False) + "\n"
    with disk_errors(run.path / LAUNCHES):
        run.path.mkdir(parents=True, exist_ok=True)
        file = os.open(run.path / LAUNCHES, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"  # a node went down in the middle of a line
            os.write(file, b"\n" * torn + line.encode())
            os.fsync(file)
        finally:
            os.close(file)


def read_launches(run: RunDir) -> list[Launch]:
    """All launches in their order; [] where there are none. Lines that cannot be read are left out."""
    launches: list[Launch] = []
    for record in _records(run.path / LAUNCHES):
        try:
            if record["event"] == "launch":
                launches.append(_launch(record))
            elif record["event"] == "end" and launches:
                launches = [_ended(one, record) if _same(one, record) else one for one in launches]
        except (KeyError, TypeError, ValueError):
            continue
    return launches


def _records(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _launch(record: dict[str, Any]) -> Launch:
    return Launch(
        job=str(record["job"]),
        restart=int(record["restart"]),
        began=float(record["time"]),
        submitted=float(record.get("submitted") or 0),
        nodes=tuple(str(node) for node in record.get("nodes", ())),
        ranks=int(record.get("ranks") or 0),
        before=Reach(int(record.get("step") or 0), int(record.get("committed") or 0)),
        notes=tuple(str(note) for note in record.get("notes", ())),
    )


def _same(launch: Launch, record: dict[str, Any]) -> bool:
    return (launch.job, launch.restart) == (str(record["job"]), int(record["restart"])) and launch.ended is None


def _ended(launch: Launch, record: dict[str, Any]) -> Launch:
    return replace(
        launch,
        ended=float(record["time"]),
        code=int(record["code"]),
        to_step=int(record.get("step") or 0),
        why=str(record.get("why", "")),
        then=str(record.get("then", "")),
    )
