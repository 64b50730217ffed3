"""When a checkpoint is written, and what follows from it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mf_scale import faults
from mf_scale.distributed import comm
from mf_scale.errors import UserError
from mf_scale.rundir import STATE
from mf_scale.training.checkpoint import begin, commit, point_latest, write_files
from mf_scale.training.recorder import Recorder
from mf_scale.training.retention import retain
from mf_scale.training.session import Session
from mf_scale.training.snapshot import FileBytes, Snapshot, live_files
from mf_scale.training.state import surroundings
from mf_scale.training.writer import Writer, attempt

RETRY_SECONDS = 60.0
"""After a save that failed, the next try comes as soon, if none is due before."""
_POLL_SECONDS = 0.05


@dataclass
class _Pending:
    """A save whose files are being written."""

    step: int
    began: float
    stall: float
    """Seconds that the training has paid so far."""


class Saver:
    """Commits checkpoints of a session by steps and by the clock. All ranks call its methods together.

    Asynchronously (`checkpoint.asynchronous`) the training waits for a copy into host memory; a thread of each rank
    writes; once the ranks know in their step's collective that all have written, they commit.
    """

    def __init__(self, session: Session, recorder: Recorder) -> None:
        self._session, self._recorder = session, recorder
        self._config = session.config.checkpoint
        self._snapshot = Snapshot(session.device)
        self._writer, self._remover = Writer("checkpoint"), Writer("retention")
        self._pending: _Pending | None = None
        self._committed = session.state.step if session.resumed else -1
        self._sound = {self._committed} if session.resumed else set()
        self._began = time.monotonic()
        self._retry_at: float | None = None
        self._problem: str | None = None
        self._last = False
        self._said: set[str] = set()

    def prepare(self) -> None:
        """Take the host memory of the next snapshot now: a start can wait for it more easily than a step.

        Of the tensors that are there: the moments come with the first update. UserError where the host has no room.
        """
        if self._config.asynchronous:
            try:
                self._snapshot.prepare(self._session.contents())
            except RuntimeError as error:
                what = f"there is no host memory for a checkpoint's copy: {error}"
                raise UserError(what, remedy="Save in the training thread: checkpoint.asynchronous=false.") from error

    def due_by_time(self) -> bool:
        """On rank 0, True when `checkpoint.every_minutes` have passed, or a minute since a save that failed.

        The ranks hear of it in the step's collective. False while a write is under way.
        """
        if not self._session.world.first or self._pending is not None:
            return False
        now, minutes = time.monotonic(), self._config.every_minutes
        retry = self._retry_at is not None and now >= self._retry_at
        return retry or bool(minutes and now - self._began >= 60 * minutes)

    def written(self) -> bool:
        """This rank has a write that ended, well or not, and is not committed yet."""
        return self._pending is not None and self._writer.ended

    def save(self) -> float:
        """Begin to save the present state, after finishing a save that is under way; seconds of the training it took.

        A failure is said and tried again; the run goes on.
        """
        began = time.monotonic()
        self._finish_write()
        if self._session.state.step != self._committed:
            self._start()
            if not self._config.asynchronous:
                self._finish_write()
        return time.monotonic() - began

    def commit(self) -> None:
        """Commit what was written, once the ranks agreed that every one of them has; does nothing without a save."""
        self._settle()

    def finish(self) -> None:
        """Wait for the save that is under way, if any, and commit it; for the removals that follow too."""
        self._finish_write()
        if self._remover.busy:
            self._say_once(self._remover.wait().problem)

    def save_last(self) -> None:
        """Commit before the run ends; raises UserError where that fails, since this state would be lost."""
        self._finish_write()
        self._last = True
        self.save()
        self.finish()
        if self._session.state.step != self._committed:
            what = f"the last checkpoint could not be written: {self._problem}"
            raise comm.agreed(UserError(what, where=str(self._session.run.checkpoints)))

    def _finish_write(self) -> None:
        if self._pending is None:
            return
        began = time.monotonic()
        # In short collectives, since one long wait for a slow disk would run into their time limit.
        while comm.sum_array(np.array([not self._writer.ended], dtype=np.int64))[0]:
            self._writer.join(_POLL_SECONDS)
        self._pending.stall += time.monotonic() - began
        self._settle()

    def _start(self) -> None:
        session, step = self._session, self._session.state.step
        self._began, self._retry_at = time.monotonic(), None
        faults.reach("save.snapshot", rank=session.world.rank, step=step)
        session.engine.share_buffers()
        copy = attempt(self._files)
        problem = begin(session.run, step, session.world, copy.problem)
        if problem is not None:
            self._failed(step, problem)
            return
        texts = {**session.settings, STATE: self._state()} if session.world.first else {}
        self._pending = _Pending(step, self._began, 0.0)
        self._writer.start(partial(write_files, session.run, step, session.world.rank, copy.result, texts))
        self._pending.stall = time.monotonic() - self._began

    def _files(self) -> list[FileBytes]:
        contents = self._session.contents()
        return self._snapshot.take(contents) if self._config.asynchronous else live_files(contents)

    def _settle(self) -> None:
        """Commit the pending save with its outcome; on all ranks together."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        began = time.monotonic()
        outcome = self._writer.wait()
        self._recorder.flush()  # a committed checkpoint must not know more steps than the metrics
        done = commit(self._session.run, pending.step, self._session.world, outcome)
        if done.problem is not None:
            self._failed(pending.step, done.problem)
            return
        self._committed = pending.step
        self._sound.add(pending.step)
        if self._session.world.first:
            self._tidy(pending.step)
        now = time.monotonic()
        self._recorder.event(
            "save",
            step=pending.step,
            path=self._session.run.checkpoint(pending.step).name,
            stall=round(pending.stall + now - began, 4),
            seconds=round(now - pending.began, 3),
            bytes=done.bytes,
        )

    def _tidy(self, step: int) -> None:
        """Move `latest`, and remove what is no longer kept behind the training: it takes seconds on a slow disk."""
        self._say_once(point_latest(self._session.run))
        best = self._session.state.best
        between = partial(faults.reach, "save.retain", rank=self._session.world.rank, step=step)
        if self._remover.busy:
            self._say_once(self._remover.wait().problem)
        sound = frozenset(self._sound)
        self._remover.start(partial(retain, self._session.run, self._config, best[0] if best else None, sound, between))

    def _failed(self, step: int, problem: str) -> None:
        self._problem = problem
        self._retry_at = time.monotonic() + RETRY_SECONDS
        self._recorder.event("save_failed", step=step, reason=problem)
        after = "the run ends" if self._last else "the run goes on"
        self._recorder.note(f"the checkpoint of step {step} was not written, {after}: {problem}")
        self._recorder.alert("checkpoint not written", problem)

    def _say_once(self, sentence: str | None) -> None:
        if sentence is not None and sentence not in self._said:
            self._said.add(sentence)
            self._recorder.note(sentence)

    def _state(self) -> str:
        session = self._session
        about = surroundings(
            session.run, world=session.world.size, stage=session.engine.stage, seed=session.config.seed
        )
        scale = session.engine.loss_scale.to_list()
        values: dict[str, Any] = {**session.state.to_dict(), **about, "loss_scale": scale}
        return json.dumps(values, indent=1)
