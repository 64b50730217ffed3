"""What a run tells: metrics.jsonl first, then W&B and the console. Rank 0 speaks, the others are silent."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from mf_scale.config.load import config_to_dict
from mf_scale.config.urls import without_secrets
from mf_scale.distributed import comm
from mf_scale.distributed.failures import failure_of_peer
from mf_scale.errors import EXIT_STOPPED, StoppedOnRequest, UserError
from mf_scale.fingerprint import code_facts, library_versions
from mf_scale.tracking.console import ProgressLine
from mf_scale.tracking.metrics import EVALUATION_NUMBERS, WAITING_BYTES, MetricsLog
from mf_scale.tracking.progress import Progress
from mf_scale.tracking.wandb_run import WandbRun
from mf_scale.training.fence import FencedError
from mf_scale.training.session import Session
from mf_scale.training.words import last_word, start_facts

_TICK_SECONDS = 0.5
_CHECK_SECONDS = 1.0
_PEER_SECONDS = 2.0
"""How long the first rank looks for what a peer left whose connection broke."""
_T = TypeVar("_T")


class Recorder:
    """Writes a session's events; every method does nothing on the ranks that are not first."""

    def __init__(self, session: Session, log: MetricsLog | None, wandb: WandbRun | None) -> None:
        self._session = session
        self._log = log
        self._wandb = wandb
        self._progress = ProgressLine(session.config.train.steps, sys.stderr) if log else None
        self._reached: Progress | None = None
        self._latest: dict[str, float] = {}
        self._ticked = self._checked = 0.0
        self.failure: UserError | None = None
        """Why metrics.jsonl could not be written (a full disk, another start). The ranks hear of it at the next step,
        together."""

    @property
    def cut_off(self) -> bool:
        """Another start is known to have taken the run over: nothing is told any more, nowhere."""
        return isinstance(self.failure, FencedError)

    def event(self, event: str, *, step: int | None = None, **values: Any) -> None:
        """Append an event of `step` (the present one where none is given)."""
        at = self._session.state.step if step is None else step
        record = self._keep_failure(partial(self._log.write, event, at, **values)) if self._log else None
        if self._wandb and record is not None:
            self._wandb.record(record)

    def alert(self, title: str, text: str, level: str = "WARN") -> None:
        """Tell the person wherever they are, through W&B; `note` tells the console."""
        if self._wandb and not self.cut_off:
            self._wandb.alert(title, text, level)

    def flush(self) -> str | None:
        """Force what was written to the disk, since a committed checkpoint must not know more steps than the metrics;
        a sentence where that fails."""
        return self._log.flush() if self._log else None

    def settle(self) -> None:
        """Write what a full disk kept waiting; UserError where it still does and the run ends.

        FencedError where the run is another start's by now.
        """
        problem = self.flush()
        if self.failure is not None and self.cut_off:
            raise self.failure
        if problem is not None:
            raise UserError(
                f"the last lines of {problem}",
                where=str(self._session.run.path),
                remedy="They are lost, the committed checkpoints are whole. Free some space before the next start.",
            )

    def step(self, step: int, means: dict[str, Any], **values: Any) -> None:
        """Append the means of the logging interval that ends with `step`, with whatever else is known of it, and show
        them."""
        session = self._session
        also = {"lrs": session.engine.learning_rates, "quarantined": session.state.quarantined}
        self.event("step", step=step, **{**means, **also, **values})
        left = self._session.config.train.steps - step
        self._latest = {
            "loss": means["loss"],
            "images_per_second": means["images_per_second"],
            "data_wait": means["data_wait"],
            "eta": left * means["step_time"],
        }
        if self._progress:
            self._progress.update(step, **self._latest)

    def evaluation(self, results: Mapping[str, Any]) -> None:
        """Append the numbers of an evaluation of the present weights; W&B gets the tables and pictures it left.

        `results` as in RUN/report/evaluation-SPLIT.json, which is written before.
        """
        self.event("evaluation", where="training", **{name: results.get(name) for name in EVALUATION_NUMBERS})
        if self._wandb and not self.cut_off:
            self._wandb.evaluation(self._session.state.step, f"evaluation-{results['split']}.json")

    def begin(self, start: int) -> None:
        """From now on keep how far start `start` comes, to the step."""
        if self._log and not self.cut_off:
            self._reached = Progress(self._session.run, start, self._session.state.step, self._session.state.updates)

    def tick(self) -> None:
        """A step is done: keep how far the run is, move a terminal's live line on between logging intervals."""
        if self._reached and self._may_write():
            self._reached.note(self._session.state.step, self._session.state.updates)
        now = time.monotonic()
        if self._progress and self._progress.live and now - self._ticked > _TICK_SECONDS:
            self._ticked = now
            self._progress.update(self._session.state.step, **self._latest)

    def note(self, text: str) -> None:
        """A line for the person at the console."""
        if self._progress:
            self._progress.note(text)

    def close(self, exit_code: int) -> None:
        """Leave the live line standing, let W&B finish within its time limit."""
        if self._wandb and self.cut_off:
            self._wandb.abandon()
        if self._reached and self._may_write():
            self._reached.close()
        if self._progress:
            self._progress.close()
        preempting = exit_code == EXIT_STOPPED
        lost = self._wandb.finish(exit_code, preempting=preempting) if self._wandb else None
        if lost:
            self.note(lost)
        lost = self._log.close() if self._log else None
        if lost:
            self.note(lost)

    def _may_write(self) -> bool:
        """Whether no other start has taken the run over, as known a second ago at most."""
        now = time.monotonic()
        if not self.cut_off and now - self._checked > _CHECK_SECONDS:
            self._checked = now
            self._keep_failure(self._session.fence.check)
        return not self.cut_off

    def _keep_failure(self, action: Callable[[], _T]) -> _T | None:
        """The result of `action`; keeps the first UserError, or the one that nothing can be done about."""
        try:
            return action()
        except FencedError as error:
            self.failure = error
        except UserError as error:
            self.failure = self.failure or error
        return None


@contextmanager
def open_recorder(session: Session) -> Iterator[Recorder]:
    """The recorder of a session, with its `start` event written and the start shown."""
    log = comm.together(lambda: _open_log(session) if session.world.first else None)
    wandb = None
    if log is not None:
        wandb = WandbRun(session.config.tracking, session.run, _shown_settings(session))
    recorder = Recorder(session, log, wandb)
    _announce(session, recorder)
    exit_code = 1
    try:
        yield recorder
        comm.together(recorder.settle)
        exit_code = 0
    except StoppedOnRequest:
        exit_code = EXIT_STOPPED
        raise
    except BaseException as error:
        with suppress(Exception):  # it must not hide the error
            word = last_word(error, partial(failure_of_peer, session.world, session.run, _PEER_SECONDS))
            recorder.event("stop", **word)
            recorder.alert("the run was aborted", f"at step {session.state.step:,}: {word['reason']}", "ERROR")
        raise
    finally:
        recorder.close(exit_code)


def _shown_settings(session: Session) -> dict[str, Any]:
    """What W&B shows of a start: the effective configuration, the code, the groups. No secrets."""
    config = without_secrets(config_to_dict(session.config))
    data = {"samples": session.samples, "classes": len(session.vocabulary)}
    told = {"world": session.world.size, **data, "notes": session.notes}
    return {**config, "code": code_facts(), "session": without_secrets(told)}


def _open_log(session: Session) -> MetricsLog:
    check = session.fence.check
    check()
    return MetricsLog(session.run.metrics, waiting_bytes=WAITING_BYTES, start=session.start, check=check)


def _announce(session: Session, recorder: Recorder) -> None:
    config, state = session.config, session.state
    versions = library_versions()
    recorder.event(
        "start",
        resumed=session.resumed,
        world=session.world.size,
        global_batch=config.train.global_batch,
        micro_batch=session.plan.micro_batch,
        data=state.data.to_dict(),
        steps=config.train.steps,
        versions=versions,
        code={name: told for name, told in code_facts().items() if name != "versions"},
        **start_facts(session.run, session.world, start=session.start, step=state.step),
    )
    recorder.begin(session.start)
    libraries = " ".join(f"{name} {number}" for name, number in versions.items() if name != "python")
    recorder.note(
        f"{libraries} · {session.world.size} x {session.device.type} · "
        f"ZeRO-{config.zero.stage} {config.train.precision}"
    )
    for note in session.notes:
        recorder.note(note)
    plan = session.plan
    recorder.note(
        f"{session.samples:,} samples, {len(session.vocabulary)} classes · global batch "
        f"{plan.global_batch} = {plan.micro_batch} x {plan.accumulation} accumulated x {plan.world_size} ranks"
    )
    recorder.note(
        f"resuming {session.run.path} at step {state.step:,}" if session.resumed else f"a new run in {session.run.path}"
    )
