"""When a checkpoint is written, and what follows from it."""

from __future__ import annotations

import time

from mf_scale.distributed import comm
from mf_scale.errors import UserError
from mf_scale.training.checkpoint import retain, save
from mf_scale.training.recorder import Recorder
from mf_scale.training.session import Session


class Saver:
    """Commits checkpoints of a session by steps and by the clock."""

    def __init__(self, session: Session, recorder: Recorder) -> None:
        self._session = session
        self._recorder = recorder
        self._saved_at = time.monotonic()
        self._saved_step = session.state.step if session.resumed else -1

    def due_by_time(self) -> bool:
        """True on rank 0 when `checkpoint.every_minutes` have passed; the ranks hear of it in the step's collective."""
        minutes = self._session.config.checkpoint.every_minutes
        return bool(self._session.world.first and minutes and time.monotonic() - self._saved_at >= 60 * minutes)

    def save(self) -> float:
        """Commit the present state; a failure is said and tried again when the next one is due. Seconds it took."""
        began = time.monotonic()
        problem = self._commit()
        if problem is not None:
            self._recorder.event("save_failed", reason=problem)
            self._recorder.note(f"the checkpoint was not written, the run goes on: {problem}")
        return time.monotonic() - began

    def save_last(self) -> None:
        """Commit before the run ends; raises UserError where that fails, since this state would be lost."""
        problem = self._commit()
        if problem is not None:
            what = f"the last checkpoint could not be written: {problem}"
            raise comm.agreed(UserError(what, where=str(self._session.run.checkpoints)))

    def _commit(self) -> str | None:
        session, state = self._session, self._session.state
        self._saved_at = time.monotonic()
        if state.step == self._saved_step:
            return None
        began = time.monotonic()
        session.engine.share_buffers()
        self._recorder.flush()
        problem = save(session.run, session.engine, state, session.world, session.settings)
        if problem is None:
            self._saved_step = state.step
            folder = session.run.checkpoint(state.step)
            self._recorder.event("save", path=folder.name, seconds=round(time.monotonic() - began, 3))
            if session.world.first:
                retain(session.run, session.config.checkpoint.keep_last)
        return problem
