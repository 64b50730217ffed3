"""metrics.jsonl read once from end to end, superseded lines included: what each start did, and what of it still holds.

`read_metrics` gives the lines that hold. Here the others count as well, since they are the work that was lost. Lines
of steps are looked at by their first words only: 100,000 of them are read in a fraction of a second.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECENT_SECONDS = 3600.0
MOST_RECENT = 4000
"""Lines of steps that means of the last hour are taken over at most."""
_CHUNK_BYTES = 1 << 23
_HEAD = re.compile(rb'\{"event": "([a-z_]+)", "step": (\d+), "time": ([0-9.]+)(?:, "start": (\d+))?[,}]')
"""How `MetricsLog` begins its lines."""
_BY_HEAD = (b"step", b"keys")
"""Events of which there are many, and of which most need not be parsed."""


@dataclass
class Session:
    """What metrics.jsonl tells of one `start` event and the lines that follow it."""

    number: int
    event: dict[str, Any]
    """The `start` event."""
    last_step: int
    """The last step that it told of."""
    heard: float
    """Unix seconds of its last line."""
    first_line: float | None = None
    """Unix seconds of its first line of a step."""
    last_line: float | None = None
    """Unix seconds of its last line of a step."""
    commits: dict[int, float] = field(default_factory=dict)
    """Step of a committed save -> Unix seconds at which that step was reached."""
    stop: dict[str, Any] | None = None
    rollback: dict[str, Any] | None = None

    @property
    def from_step(self) -> int:
        """The step it began at."""
        return int(self.event["step"])

    @property
    def began(self) -> float:
        """Unix seconds at which it was ready for its first step."""
        return float(self.event["time"])


@dataclass
class History:
    """All starts of a run, and what the lines that still hold tell."""

    sessions: list[Session] = field(default_factory=list)
    recent: list[dict[str, Any]] = field(default_factory=list)
    """Lines of steps of the last RECENT_SECONDS of the run, MOST_RECENT at most; the last one at least."""
    saves: list[dict[str, Any]] = field(default_factory=list)
    validation: dict[str, Any] | None = None
    quarantined: int = 0
    """Samples that did not decode."""

    @property
    def last_line(self) -> dict[str, Any] | None:
        """The last line of a step."""
        return self.recent[-1] if self.recent else None


def read_history(metrics: Path) -> History:
    """The history of a metrics.jsonl; an empty one where there is no file. Unreadable lines are left out."""
    reader = _Reader()
    try:
        with metrics.open("rb") as file:
            for line in _lines(iter(lambda: file.read(_CHUNK_BYTES), b"")):
                reader.take(line)
    except FileNotFoundError:
        pass
    return reader.history()


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines; a torn last one is left out."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


class _Reader:
    """Takes the lines in their order."""

    def __init__(self) -> None:
        self._sessions: list[Session] = []
        self._recent: deque[tuple[int, float, bytes]] = deque(maxlen=MOST_RECENT)
        self._saves: list[dict[str, Any]] = []
        self._validations: list[dict[str, Any]] = []
        self._quarantines: list[int] = []

    def take(self, line: bytes) -> None:
        """One line."""
        head = _HEAD.match(line)
        if head is not None and head[1] in _BY_HEAD:
            if not line.endswith(b"}"):
                return
            session = self._session(int(head[4]) if head[4] else None)
            if session is not None:
                self._step(session, head[1].decode(), int(head[2]), float(head[3]), line)
            return
        record = _parse(line)
        if record is None:
            return
        if record["event"] == "start":
            self._start(record)
            return
        session = self._session(record.get("start"))
        if session is None:
            return
        if record["event"] in ("step", "keys"):
            self._step(session, record["event"], record["step"], record["time"], line)
        else:
            self._event(session, record)

    def history(self) -> History:
        """What was taken."""
        oldest = self._recent[-1][1] - RECENT_SECONDS if self._recent else 0.0
        recent = [record for _, at, line in self._recent if at >= oldest and (record := _parse(line)) is not None]
        validation = self._validations[-1] if self._validations else None
        return History(self._sessions, recent, self._saves, validation, len(self._quarantines))

    def _session(self, number: int | None) -> Session | None:
        """Whose line it is: None where it is a survivor's, of an older start than the newest one."""
        if not self._sessions:
            return None
        newest = self._sessions[-1]
        return None if number is not None and number < newest.number else newest

    def _start(self, record: dict[str, Any]) -> None:
        number = record.get("start")
        newest = self._sessions[-1].number if self._sessions else 0
        if isinstance(number, int) and number < newest:
            return
        step = record["step"]
        while self._recent and self._recent[-1][0] > step:
            self._recent.pop()
        self._saves = [save for save in self._saves if save["step"] <= step]
        self._validations = [one for one in self._validations if one["step"] <= step]
        self._quarantines = [one for one in self._quarantines if one <= step]
        number = number if isinstance(number, int) else newest + 1
        self._sessions.append(Session(number, record, step, record["time"]))

    def _step(self, session: Session, event: str, step: int, at: float, line: bytes) -> None:
        session.last_step = max(session.last_step, step)
        session.heard = at
        if event == "step":
            session.first_line = session.first_line or at
            session.last_line = at
            self._recent.append((step, at, line))

    def _event(self, session: Session, record: dict[str, Any]) -> None:
        event, step, at = record["event"], record["step"], record["time"]
        if event == "evaluation":
            return  # another command's
        session.heard, session.last_step = at, max(session.last_step, step)
        if event in ("stop", "rollback"):
            setattr(session, event, record)
        elif event == "save":
            self._saves.append(record)
            seconds = record.get("seconds")
            session.commits[step] = at - seconds if isinstance(seconds, int | float) else at
        elif event == "validation":
            self._validations = [one for one in self._validations if one["step"] != step] + [record]
        elif event == "quarantine":
            self._quarantines.append(step)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    sound = (
        isinstance(record, dict)
        and isinstance(record.get("event"), str)
        and isinstance(record.get("step"), int)
        and isinstance(record.get("time"), int | float)
    )
    return record if sound else None
