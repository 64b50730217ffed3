"""What a run tells: metrics.jsonl first, then W&B and the console. Rank 0 speaks, the others are silent."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from mf_scale.config.load import config_to_dict
from mf_scale.distributed import comm
from mf_scale.errors import EXIT_STOPPED, StoppedOnRequest, UserError
from mf_scale.tracking.console import ProgressLine
from mf_scale.tracking.metrics import WAITING_BYTES, MetricsLog
from mf_scale.tracking.progress import Progress
from mf_scale.tracking.wandb_run import WandbRun
from mf_scale.training.fence import FencedError
from mf_scale.training.session import Session
from mf_scale.training.state import library_versions
from mf_scale.training.words import last_word, start_facts

_TO_WANDB = ("step", "validation")
_TICK_SECONDS = 0.5
_CHECK_SECONDS = 1.0


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
        if self._log:
            self._keep_failure(partial(self._log.write, event, at, **values))
        if self._wandb and event in _TO_WANDB and not self.cut_off:
            prefix = "train" if event == "step" else event
            self._wandb.log(at, {f"{prefix}/{name}": value for name, value in _numbers(values)})

    def alert(self, title: str, text: str) -> None:
        """Tell the person wherever they are, through W&B; `note` tells the console."""
        if self._wandb and not self.cut_off:
            self._wandb.alert(title, text)

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
        """Append the means of the logging interval that ends with `step` and show them."""
        self.event("step", step=step, **means, **values)
        left = self._session.config.train.steps - step
        self._latest = {
            "loss": means["loss"],
            "images_per_second": means["images_per_second"],
            "data_wait": means["data_wait"],
            "eta": left * means["step_time"],
        }
        if self._progress:
            self._progress.update(step, **self._latest)

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

    def _keep_failure(self, action: Callable[[], None]) -> None:
        """Run `action`; keep the first UserError, or the one that nothing can be done about."""
        try:
            action()
        except FencedError as error:
            self.failure = error
        except UserError as error:
            self.failure = self.failure or error


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Numbers under their names, those of a mapping as `name/inner`."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float):
            yield name, value


@contextmanager
def open_recorder(session: Session) -> Iterator[Recorder]:
    """The recorder of a session, with its `start` event written and the start shown."""
    log = comm.together(lambda: _open_log(session) if session.world.first else None)
    wandb = None
    if log is not None:
        wandb = WandbRun(session.config.tracking, session.run, config_to_dict(session.config))
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
            recorder.event("stop", **last_word(error))
        raise
    finally:
        recorder.close(exit_code)


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
