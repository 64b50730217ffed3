"""What a run looks at between two steps: the validation loss and the evaluation of its validation source."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mf_scale import faults
from mf_scale.training.evaluating import Evaluate, evaluate_now, evaluation_due
from mf_scale.training.preemption import StopFlag
from mf_scale.training.recorder import Recorder
from mf_scale.training.saver import Saver
from mf_scale.training.session import Session
from mf_scale.training.validation import validation_loss
from mf_scale.training.watchdog import Watchdog


class Looks:
    """The looks of a session. All ranks call its methods together; what a stop interrupts stays due, also in the
    checkpoint. The steps before are to be settled."""

    def __init__(
        self,
        session: Session,
        recorder: Recorder,
        saver: Saver,
        flag: StopFlag,
        watchdog: Watchdog,
        evaluate: Evaluate | None,
    ) -> None:
        """`evaluate` makes an evaluation; none: none is made."""
        self._session, self._recorder, self._saver = session, recorder, saver
        self._flag, self._watchdog, self._evaluate = flag, watchdog, evaluate

    @property
    def due(self) -> bool:
        """Something is to be looked at at the present step."""
        return self._validation_due() or evaluation_due(self._session, self._evaluate)

    def validate(self) -> float:
        """Take the validation loss where it is due; seconds it took."""
        if not self._validation_due():
            return 0.0
        began = time.perf_counter()
        session, step = self._session, self._session.state.step
        assert session.validation is not None
        self._watchdog.alive("validation", step)
        faults.reach("train.validation", rank=session.world.rank, step=step)
        with session.validated_weights():
            values = validation_loss(
                session.engine,
                session.criterion,
                session.validation,
                session.config,
                session.plan,
                session.world,
                session.transfer,
                self._saver,
                self._stop_wanted,
            )
        if values is not None:
            session.state.note_validation(values["loss"])
            told: dict[str, Any] = {"weights": session.validated, **values}
            self._recorder.event("validation", **told)
            bad = f", without {values['undecodable']} samples that do not decode" if values["undecodable"] else ""
            self._recorder.note(f"step {step}: validation loss {values['loss']:.4g}{bad}")
        return time.perf_counter() - began

    def evaluate(self, adds: Callable[[], bool]) -> float:
        """Evaluate where it is due; seconds it took. `adds`: a checkpoint would hold other weights than the newest."""
        if self._evaluate is None or not evaluation_due(self._session, self._evaluate):
            return 0.0
        parts = self._session, self._recorder, self._saver, self._watchdog
        return evaluate_now(*parts, self._evaluate, lambda: self._flag.wanted, adds)

    def _stop_wanted(self) -> bool:  # asked once a batch
        self._watchdog.alive("validation", self._session.state.step)
        return self._flag.wanted

    def _validation_due(self) -> bool:
        every, state = self._session.config.eval.every_steps, self._session.state
        here = bool(every) and state.step > 0 and state.step % every == 0
        return here and self._session.validation is not None and state.validated < state.step
