"""When a checkpoint is written, and what follows from it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mf_scale import faults
from mf_scale.distributed import comm
from mf_scale.errors import FaultError, UserError
from mf_scale.rundir import STATE
from mf_scale.training.checkpoint import begin, commit, point_latest, write_files
from mf_scale.training.recorder import Recorder
from mf_scale.training.retention import retain
from mf_scale.training.session import Session
from mf_scale.training.snapshot import FileBytes, Snapshot, live_files
from mf_scale.training.state import surroundings
from mf_scale.training.tensor_file import lay_out
from mf_scale.training.writer import Writer, attempt

RETRY_SECONDS = 60.0
"""After a save that failed, the next try comes as soon, if none is due before."""
SLOW_SECONDS = 300.0
"""A write that takes longer is said: a storage that hangs raises nothing."""
_POLL_SECONDS = 0.05


@dataclass
class _Pending:
    """A save whose files are being written."""

    step: int
    began: float
    evaluated: int
    """`TrainState.evaluated` as it is written."""
    stall: float
    """Seconds that the training has paid so far."""
    slow: bool = False
    """It was said already that the write takes long."""


class Saver:
    """Commits checkpoints of a session by steps and by the clock. All ranks call its methods together.

    Where another start has taken the run over, the next one to be begun or committed raises FencedError on all of them.

    Asynchronously (`checkpoint.asynchronous`) the training waits for a copy into host memory; a thread of each rank
    writes; once the ranks know in their step's collective that all have written, they commit.
    """

    def __init__(self, session: Session, recorder: Recorder, alive: Callable[[], None] = lambda: None) -> None:
        """`alive` is called as a sign of life while it works and waits."""
        self._session, self._recorder, self._alive = session, recorder, alive
        self._config = session.config.checkpoint
        self._snapshot = Snapshot(session.device)
        self._writer, self._remover = Writer("checkpoint"), Writer("retention")
        self._pending: _Pending | None = None
        # A state that went back differs from its checkpoint's in what it leaves out.
        self._committed = session.state.step if session.resumed and not session.rolled_back else -1
        self._evaluated = session.state.evaluated  # as the committed one tells
        self._sound = {session.state.step} if session.resumed else set()
        self._began = time.monotonic()
        self._retry_at: float | None = None
        self._problem: str | None = None
        self._last = self._failing = False
        self._untidy: int | None = None
        """Step of a save after which nothing was removed, since an earlier removal was under way."""
        self._said: set[str] = set()

    def prepare(self) -> None:
        """Take the host memory of every snapshot now: a start can wait for it more easily than a step.

        UserError where the host has no room for it, and, saving synchronously too, for a tensor that a checkpoint
        cannot hold.
        """
        try:
            if self._config.asynchronous:
                self._snapshot.prepare(self._session.contents())
            else:
                for content in self._session.contents():
                    lay_out(content.tensors, content.metadata)
        except RuntimeError as error:
            what = f"there is no host memory for a checkpoint's copy: {error}"
            raise UserError(what, remedy="Save in the training thread: checkpoint.asynchronous=false.") from error
        except TypeError as error:
            what = f"the model cannot be saved: {error}"
            raise UserError(what, where="checkpoint", remedy="Give the model no tensor of this type.") from error

    def due_by_time(self) -> bool:
        """On rank 0, True when `checkpoint.every_minutes` have passed, or a minute since a save that failed.

        The ranks hear of it in the step's collective. False while a write is under way.
        """
        if self._pending is not None:
            self._say_slow(self._pending, [] if self._writer.ended else [self._session.world.rank])
        if not self._session.world.first or self._pending is not None:
            return False
        now, minutes = time.monotonic(), self._config.every_minutes
        retry = self._retry_at is not None and now >= self._retry_at
        return retry or bool(minutes and now - self._began >= 60 * minutes)

    def written(self) -> bool:
        """This rank has a write that ended, well or not, and is not committed yet."""
        return self._pending is not None and self._writer.ended

    @property
    def newest(self) -> int:
        """Step of the newest state that was saved or is being saved; -1: none."""
        return self._committed if self._pending is None else self._pending.step

    def save(self) -> float:
        """Begin to save the present state, after finishing a save that is under way; seconds of the training it took.

        A failure is said and tried again; the run goes on.
        """
        began = time.monotonic()
        self._alive()
        self._finish_write()
        if self._session.state.step != self._committed or self._session.state.evaluated != self._evaluated:
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
        if self._untidy is not None:
            self._tidy(self._untidy)
            self._say_once(self._remover.wait().problem)

    def save_last(self) -> None:
        """Commit before the run ends; raises FaultError where that fails, since this state would be lost.

        FencedError also where nothing is left to be saved: a start that was cut off has not ended as its run has.
        """
        self._finish_write()
        comm.on_first_rank(self._session.fence.check)
        self._last = True
        self.save()
        self.finish()
        if self._session.state.step != self._committed:
            what = f"the last checkpoint could not be written: {self._problem}"
            remedy = "Then start the same command again: committed checkpoints are intact."
            raise comm.agreed(FaultError(what, where=str(self._session.run.checkpoints), remedy=remedy))

    def _finish_write(self) -> None:
        if self._pending is None:
            return
        began = time.monotonic()
        # In short collectives, since one long wait for a slow disk would run into their time limit.
        mine = np.zeros(self._session.world.size, dtype=np.int64)
        while True:
            self._alive()
            mine[self._session.world.rank] = not self._writer.ended
            writing = np.flatnonzero(comm.sum_array(mine))
            if not writing.size:
                break
            self._say_slow(self._pending, writing.tolist())
            self._writer.join(_POLL_SECONDS)
        self._pending.stall += time.monotonic() - began
        self._settle()

    def _start(self) -> None:
        session, step = self._session, self._session.state.step
        self._began, self._retry_at = time.monotonic(), None
        faults.reach("save.snapshot", rank=session.world.rank, step=step)
        session.engine.share_buffers()
        copy = attempt(self._files)
        problem = begin(session.run, session.fence, step, session.world, copy.problem)
        if problem is not None:
            self._failed(step, problem)
            return
        texts = {**session.settings, STATE: self._state()} if session.world.first else {}
        self._pending = _Pending(step, self._began, session.state.evaluated, 0.0)
        here = session.run, session.fence, step, session.world.rank
        self._writer.start(partial(write_files, *here, copy.result, texts))
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
        unwritten = self._recorder.flush()  # a committed checkpoint must not know more steps than the metrics
        if unwritten is not None:
            outcome = replace(outcome, result=None, problem=outcome.problem or unwritten)
        session = self._session
        done = commit(session.run, session.fence, pending.step, session.world, outcome)
        if done.problem is not None:
            self._failed(pending.step, done.problem)
            return
        self._committed, self._evaluated, self._failing = pending.step, pending.evaluated, False
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
        session = self._session
        self._say_once(point_latest(session.run, session.fence))
        if self._remover.busy and not self._remover.ended:
            self._untidy = step  # the training does not wait for it: the next save removes more
            return
        if self._remover.busy:
            self._say_once(self._remover.wait().problem)
        self._untidy = None
        between = partial(faults.reach, "save.retain", rank=session.world.rank, step=step)
        self._remover.start(partial(retain, session.run, session.fence, self._config, frozenset(self._sound), between))

    def _failed(self, step: int, problem: str) -> None:
        self._problem = problem
        self._retry_at = time.monotonic() + RETRY_SECONDS
        self._recorder.event("save_failed", step=step, reason=problem)
        after = "the run ends" if self._last else "the run goes on"
        self._recorder.note(f"the checkpoint of step {step} was not written, {after}: {problem}")
        if not self._failing:  # once, and not once a minute until somebody has made room
            self._recorder.alert("checkpoint not written", problem)
        self._failing = True

    def _say_slow(self, pending: _Pending, ranks: list[int]) -> None:
        """Once for a write that takes unusually long; `ranks` are those known to write still."""
        seconds = time.monotonic() - pending.began
        if pending.slow or seconds < SLOW_SECONDS:
            return
        pending.slow = True
        who = f" on rank {', '.join(map(str, ranks[:8]))}" if ranks else ""
        what = f"the checkpoint of step {pending.step} is being written for {seconds / 60:.0f} minutes{who}"
        self._recorder.event("save_slow", step=pending.step, seconds=round(seconds, 3), ranks=ranks)
        self._recorder.note(f"{what}: the storage is slow or hangs")
        self._recorder.alert("checkpoint slow", what)

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
