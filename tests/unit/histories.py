"""Histories of runs for tests: the files that a training and its job script leave, made line by line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mf_scale.rundir import MANIFEST, RunDir
from mf_scale.tracking.launches import LAUNCHES
from mf_scale.tracking.progress import PROGRESS, SLOT_BYTES, Slot

T0 = 1_700_000_000.0


class Maker:
    """A run directory to which starts are added; `time` is its clock, `start` the number of the newest start."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.run, self.time, self.start, self.step, self.began = RunDir(folder), T0, 0, 0, T0

    def line(self, event: str, step: int, **values: Any) -> None:
        """One line of metrics.jsonl."""
        record = {"event": event, "step": step, "time": round(self.time, 3), "start": self.start, **values}
        self._append("metrics.jsonl", record)

    def launched(self, job: str, restart: int, *nodes: str, ranks: int = 2) -> None:
        """A job script begins."""
        values = {"submitted": T0, "nodes": nodes, "ranks": ranks, "step": self.step, "notes": []}
        self._append(LAUNCHES, {"event": "launch", "time": self.time, "job": job, "restart": restart, **values})

    def script_ended(self, job: str, restart: int, code: int, why: str, then: str, *signals: str) -> None:
        """It ends."""
        values = {"code": code, "signals": signals, "step": self.step, "why": why, "then": then}
        self._append(LAUNCHES, {"event": "end", "time": self.time, "job": job, "restart": restart, **values})

    def begun(self, step: int, **values: Any) -> None:
        """A training is ready for the step after `step`."""
        self.start, self.step, self.began = self.start + 1, step, self.time
        self.line("start", step, resumed=step > 0, world=2, global_batch=8, steps=100, **values)
        self.slot()

    def steps(self, to: int, *, every: int = 1, seconds: float = 2.0, slots: bool = True) -> None:
        """Steps up to `to`, with a line every so many; without `slots` as where progress was lost with its node."""
        for step in range(self.step + 1, to + 1):
            self.step, self.time = step, self.time + seconds
            if step % every == 0:
                means = {"loss": 9 / step, "images_per_second": 8 / seconds, "step_time": seconds, "data_wait": 0.25}
                self.line("step", step, **means, updates=step, lr=0.1)
        if slots:
            self.slot(first=self.began + seconds)

    def saved(self, *, seconds: float = 1.0) -> None:
        """A save of the present step, committed after `seconds`."""
        folder = self.run.checkpoint(self.step)
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text("{}")
        self.time += seconds
        self.line("save", self.step, path=folder.name, stall=0.5, seconds=seconds, bytes=5_000_000)
        self.time -= seconds  # the training did not wait for it

    def stopped(self, reason: str, code: int) -> None:
        """Its last word."""
        self.line("stop", self.step, reason=reason, exit_code=code)

    def passed(self, seconds: float) -> None:
        """Nothing happens."""
        self.time += seconds

    def slot(self, first: float = 0.0) -> None:
        """Its progress, as it would stand in the file now."""
        old = self._read_slot()
        from_step, stepped = old if old is not None else self.step, self.time if first else 0.0
        slot = Slot(self.start, from_step, self.step, self.step, self.began, first, stepped, self.time)
        file = os.open(self.run.path / PROGRESS, os.O_RDWR | os.O_CREAT)
        os.pwrite(file, slot.line(), (self.start - 1) * SLOT_BYTES)
        os.close(file)

    def _read_slot(self) -> int | None:
        from mf_scale.tracking.progress import read_progress

        slot = read_progress(self.run).get(self.start)
        return slot.from_step if slot else None

    def _append(self, file: str, record: dict[str, Any]) -> None:
        with (self.run.path / file).open("a") as stream:
            stream.write(json.dumps(record) + "\n")
