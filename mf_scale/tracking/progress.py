"""RUN/progress: how far each start of a run has come, to the step; the lines of metrics.jsonl come at intervals only.

One slot of fixed size a start, rewritten in place by its rank 0. It is left to the system when it reaches the disk: it
survives the death of the process, not that of the node. No two starts write one slot, so a survivor spoils nothing.

    START FROM STEP UPDATES BEGAN FIRST STEPPED LAST     (steps; Unix seconds, 0.000: not yet), padded with blanks
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mf_scale.rundir import RunDir, checkpoint_step, committed_checkpoints

PROGRESS = "progress"
SLOT_BYTES = 128
"""A divisor of every page size, so that a slot is written whole."""
_SHARE = 0.01
"""Of the training's time that writing may take: on a slow file system the slot comes less often than the steps."""
_LONGEST_SECONDS = 60.0
"""Between two writes on the slowest file system, and after a failed one."""
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Slot:
    """How far one start has come."""

    start: int
    from_step: int
    """The step it began at."""
    step: int
    """Steps of the run that are done."""
    updates: int
    began: float
    """Unix seconds at which it was ready for its first step."""
    first: float
    """Unix seconds at which its first step was done; 0: none is."""
    stepped: float
    """Unix seconds at which its last step was done; 0: none is."""
    last: float
    """Unix seconds of the last write: a sign of life."""

    def line(self) -> bytes:
        """The slot as it stands in the file, SLOT_BYTES long."""
        counts = f"{self.start} {self.from_step} {self.step} {self.updates}"
        times = f"{self.began:.3f} {self.first:.3f} {self.stepped:.3f} {self.last:.3f}"
        return f"{counts} {times}".ljust(SLOT_BYTES - 1).encode() + b"\n"


class Progress:
    """The writer of one start's slot. It never stops a run: what cannot be written is tried again later."""

    def __init__(self, run: RunDir, start: int, step: int, updates: int) -> None:
        """Of start `start` (from 1), which is ready for the step after `step`."""
        now = time.time()
        self._slot = Slot(start, step, step, updates, now, 0.0, 0.0, now)
        self._offset = (start - 1) * SLOT_BYTES
        self._next = 0.0
        self._file = -1
        with contextlib.suppress(OSError):
            self._file = os.open(run.path / PROGRESS, os.O_WRONLY | os.O_CREAT, 0o644)
        self._write()

    def note(self, step: int, updates: int) -> None:
        """`step` steps are done. Written at once, unless the file system is so slow that it would hold up the steps."""
        now = time.time()
        old = self._slot
        first = old.first or (now if step > old.from_step else 0.0)
        self._slot = Slot(old.start, old.from_step, step, updates, old.began, first, now, now)
        if time.monotonic() >= self._next:
            self._write()

    def close(self) -> None:
        """A last sign of life; closing twice is fine."""
        if self._file >= 0:
            self._slot = replace(self._slot, last=time.time())
            self._write()
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = -1

    def _write(self) -> None:
        if self._file < 0:
            return
        began = time.monotonic()
        wait = _LONGEST_SECONDS
        with contextlib.suppress(OSError):
            os.pwrite(self._file, self._slot.line(), self._offset)
            wait = min(wait, (time.monotonic() - began) / _SHARE)
        self._next = time.monotonic() + wait


def read_progress(run: RunDir) -> dict[int, Slot]:
    """Start -> its slot; {} where there is no file. Slots that cannot be read are left out."""
    try:
        data = (run.path / PROGRESS).read_bytes()
    except OSError:
        return {}
    slots = (_slot(data[at : at + SLOT_BYTES]) for at in range(0, len(data), SLOT_BYTES))
    return {slot.start: slot for slot in slots if slot is not None}


def furthest_step(run: RunDir) -> int:
    """The furthest step that any start of the run has come to: by its progress, its last lines, its checkpoints."""
    slots = (slot.step for slot in read_progress(run).values())
    checkpoints = (checkpoint_step(folder) for folder in committed_checkpoints(run))
    return max([0, *slots, *checkpoints, *(record["step"] for record in last_lines(run.metrics))])


@dataclass(frozen=True)
class Reach:
    """How far a run has come. A start that goes on from an older checkpoint commits before it takes a new step."""

    step: int
    """The furthest step that any start has come to."""
    committed: int
    """Step of the newest checkpoint; 0: there is none."""

    def further_than(self, other: Reach) -> bool:
        """Whether something was reached or committed that `other` had not."""
        return self.step > other.step or self.committed > other.committed


def reach_of(run: RunDir) -> Reach:
    """How far a run has come."""
    newest = next(iter(committed_checkpoints(run)), None)
    return Reach(furthest_step(run), checkpoint_step(newest) if newest else 0)


def last_lines(metrics: Path) -> list[dict[str, Any]]:
    """The last whole lines of a metrics.jsonl, one at least where there is one, in their order; [] without the file."""
    try:
        with metrics.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            size = _TAIL_BYTES
            while True:
                at = max(0, end - size)
                file.seek(at)
                lines = file.read(end - at).split(b"\n")
                # The first is cut unless it is the file's first; the last is empty or torn.
                records = [record for line in lines[(at > 0) : -1] if (record := _record(line)) is not None]
                if records or at == 0:
                    return records
                size *= 8  # a line may hold the keys of a whole step
    except OSError:
        return []


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("event"), str)
    return record if whole else None


def _slot(line: bytes) -> Slot | None:
    words = line.split()
    if len(line) != SLOT_BYTES or len(words) != 8:
        return None
    try:
        start, from_step, step, updates = (int(word) for word in words[:4])
        began, first, stepped, last = (float(word) for word in words[4:])
    except ValueError:
        return None
    return Slot(start, from_step, step, updates, began, first, stepped, last)
