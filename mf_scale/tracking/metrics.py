"""metrics.jsonl, the truth about a run: append-only, one JSON object a line, replayed steps supersede the old ones.

Lines of a training carry "start", the number of its start in the run directory: those of a start that was cut off,
written after a newer one began, do not count.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mf_scale.errors import UserError
from mf_scale.rundir import NO_SPACE, disk_errors

DURABLE_EVENTS = frozenset({"start", "save", "evaluation", "rollback", "stop"})
"""Events after which the file is forced to the disk: what a committed checkpoint claims is then in the file too."""
PROCESS_EVENTS = frozenset({"start", "stop", "rollback"})
"""Events of a process, not of the series of steps: a rollback does not undo that they happened."""
EVALUATION_NUMBERS = ("split", "samples", "mIoU", "PQ", "AP", "images_per_second")
"""What the `evaluation` event takes of an evaluation's results, beside "where": "training" or "command"."""
WAITING_BYTES = 64 * 2**20
"""What a training keeps of lines while a disk is full: some 60,000 steps."""
_TAIL_BYTES = 1 << 16


class MetricsLog:
    """The writer of one metrics.jsonl; one process writes. A torn last line is dropped on opening.

    While the disk is full up to `waiting_bytes` of lines wait in memory, and are written in their order once there is
    room: a run outlives a full disk, of which a save that failed has told already.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        waiting_bytes: int = 0,
        start: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Open or create the file; raises UserError where it cannot be written.

        `start` stands in every line. `check` is called before each change of the file; where it raises a UserError,
        nothing is changed.
        """
        self.path = Path(path)
        self._start, self._check = start, check
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes, self._most_waiting = 0, waiting_bytes
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            end = _end_of_last_line(self._file)
            if end < os.fstat(self._file).st_size:
                check()
                os.ftruncate(self._file, end)

    def write(self, event: str, step: int, **values: Any) -> dict[str, Any]:
        """Append one line with "event", "step", "time" (Unix seconds), "start" and `values`; the line as it is read.

        Non-finite floats become null and their names stand in "nonfinite", so that every line is valid JSON.
        UserError where the line cannot be kept.
        """
        record = _record(event, step, self._start, values)
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        with disk_errors(self.path):
            try:
                self._write_waiting()
                if event in DURABLE_EVENTS:
                    os.fsync(self._file)
            except (OSError, UserError) as error:
                full = isinstance(error, OSError) and error.errno in NO_SPACE
                if full and self._waiting_bytes <= self._most_waiting:
                    return record
                if self._waiting:
                    self._waiting_bytes -= len(self._waiting.pop())
                raise
        return record

    def flush(self) -> str | None:
        """Force every line to the disk; a sentence where it does not take them."""
        try:
            self._write_waiting()
            os.fsync(self._file)
        except (OSError, UserError) as error:
            waiting = f", {len(self._waiting):,} lines wait in memory" if self._waiting else ""
            return f"{self.path.name} cannot be written ({_told(error)}{waiting})"
        return None

    def close(self) -> str | None:
        """Write what waits and close the file; a sentence where lines are lost. Closing twice is fine."""
        if self._file < 0:
            return None
        lost = None
        try:
            self._write_waiting()
        except (OSError, UserError) as error:
            lost = f"{len(self._waiting):,} lines of {self.path} are lost ({_told(error)})"
        os.close(self._file)
        self._file = -1
        self._waiting.clear()
        return lost

    def _write_waiting(self) -> None:
        """Write the lines, whole ones only; raises the system's own OSError and keeps what was not written."""
        while self._waiting:
            self._check()
            end = os.fstat(self._file).st_size
            # A start that was cut off may have left half a line behind: what glued to it would be lost with it.
            torn = end > 0 and os.pread(self._file, 1, end - 1) != b"\n"
            line, written = b"\n" * torn + self._waiting[0], 0
            try:
                while written < len(line):  # one write for all but a disk that fills up in the middle of it
                    written += os.write(self._file, line[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    # Only what is ours: behind it may stand lines of the start that has taken over.
                    if written and os.fstat(self._file).st_size == end + written:
                        os.ftruncate(self._file, end)
                raise
            self._waiting_bytes -= len(self._waiting.popleft())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every line that still holds, in order; [] where there is no file.

    A `start` line takes the run back to its step: lines of later steps written before it are superseded, and lines of
    older starts written behind it are left out. A validation, and an evaluation in training, that was made up for
    after a stop or made again after a kill supersedes an earlier one of its step.
    A torn last line is left out; other unreadable lines are left out with a warning.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    kept: list[dict[str, Any]] = []
    looks: set[tuple[Any, ...]] = set()
    unreadable = newest = furthest = 0
    for line in lines[:-1]:
        record = _parse(line)
        if record is None:
            unreadable += bool(line.strip())
            continue
        start, step = record.get("start"), record["step"]
        if isinstance(start, int) and start < newest:
            continue
        if record["event"] == "start":
            newest = start if isinstance(start, int) else newest
            if step < furthest:  # of a job that was started 300 times most starts take nothing back
                kept = [r for r in kept if r["step"] <= step or r["event"] in PROCESS_EVENTS]
                furthest = step
        if look := _look(record):
            if look in looks:
                kept = [r for r in kept if _look(r) != look]
            looks.add(look)
        furthest = max(furthest, step)
        kept.append(record)
    if unreadable:
        logging.getLogger(__name__).warning("%s: %d unreadable lines are left out", path, unreadable)
    return kept


def _look(record: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What the training looks at once a step: its validation, or its evaluation of a split."""
    event, where = record["event"], record.get("where")
    if event == "validation" or (event == "evaluation" and where == "training"):
        return event, record["step"], record.get("split")
    return None


def newest_start(path: str | Path) -> int:
    """The highest number of a start in the file, or how many it tells of; 0 where there is no file.

    Parses `start` lines only, so that a long file costs little. Raises the system's own OSError.
    """
    count, highest = 0, 0
    try:
        with Path(path).open("rb") as file:
            for line in file:
                record = _parse(line) if b'"event": "start"' in line else None
                if record is not None and record["event"] == "start":
                    number = record.get("start")
                    count, highest = count + 1, max(highest, number if isinstance(number, int) else 0)
    except FileNotFoundError:
        return 0
    return max(count, highest)


def _told(error: OSError | UserError) -> str:
    return error.what if isinstance(error, UserError) else error.strerror or str(error)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    sound = isinstance(record, dict) and isinstance(record.get("event"), str) and isinstance(record.get("step"), int)
    return record if sound else None


def _record(event: str, step: int, start: int | None, values: Mapping[str, Any]) -> dict[str, Any]:
    nonfinite: list[str] = []
    plain = {name: _plain(value, name, nonfinite) for name, value in values.items()}
    number = {} if start is None else {"start": start}
    record = {"event": event, "step": int(step), "time": round(time.time(), 3), **number, **plain}
    return {**record, "nonfinite": nonfinite} if nonfinite else record


def _plain(value: Any, name: str, nonfinite: list[str]) -> Any:
    """JSON form of `value`: mappings, sequences, paths, numpy and torch scalars; notes non-finite floats by name."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{name}.{k}", nonfinite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{name}.{i}", nonfinite) for i, v in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    return value


def _end_of_last_line(file: int) -> int:
    """Length of the file up to and with its last newline."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
