"""What became of the steps, learnt one step late: counters, average, means, guards.

The device is still at work on a step when its successor's forward pass begins, so the host reads a step's values
between that successor's backward pass and update (the matcher has waited for the device by then), and at once where
something depends on them: a checkpoint, a validation, the end.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from mf_scale.distributed import comm
from mf_scale.training.guard import DeadSteps, skip_report, skip_sentence, stop_dead_run
from mf_scale.training.meter import Meter
from mf_scale.training.phases import StepTimes
from mf_scale.training.profiling import is_profiled
from mf_scale.training.recorder import Recorder
from mf_scale.training.schedule import lr_factor
from mf_scale.training.session import Session
from mf_scale.training.spike import SpikeGuard
from mf_scale.training.startup import seconds_since_start
from mf_scale.training.step import StepResult, StepValues
from mf_scale.training.straggler import Stragglers, host_of, slowest, straggler_sentence


@dataclass(frozen=True)
class Spike:
    """A step whose loss jumped."""

    step: int
    """Its number, from 1."""
    keys: list[str]
    """This rank's samples of it."""


class Ledger:
    """Keeps the books of a session's steps."""

    def __init__(self, session: Session, recorder: Recorder) -> None:
        config, state = session.config, session.state
        self._session, self._recorder = session, recorder
        self._meter = Meter(session.criterion, session.world, session.device)
        self._stragglers = Stragglers(config.train, session.world)
        self._dead = DeadSteps(config.guard, state.skipped, state.step)
        self._spikes = SpikeGuard(config.guard, state.losses)
        self._open: tuple[StepResult, float] | None = None
        self._unjudged: tuple[StepResult, float] | None = None
        self._start_seconds: float | None = None
        self._told_start = session.rolled_back  # the process is older than this session
        self.spike: Spike | None = None
        """Set, on all ranks, once a loss was found to jump."""
        self.dead: str | None = None
        """Set, on all ranks, to the reason once there were too many steps without an update."""

    @property
    def halted(self) -> bool:
        """The run cannot simply go on."""
        return self.spike is not None or self.dead is not None

    @property
    def dead_row(self) -> int:
        """Steps without an update that end with the last one whose outcome is known."""
        return self._dead.in_a_row

    def book(self, result: StepResult, data_wait: float) -> None:
        """Take a step whose values are on their way; the one before is settled."""
        self._start_seconds = self._start_seconds or seconds_since_start()
        self._open = (result, data_wait)

    def pause(self, seconds: float) -> None:
        """Leave what came between two steps (a checkpoint, a validation) out of speed and phases."""
        if seconds:
            self._session.phases.restart()

    def settle(self) -> None:
        """Read the step that is open, if any; all ranks call it at the same places."""
        if self._open is None:
            return
        (result, data_wait), self._open = self._open, None
        session, values = self._session, result.read()
        times = result.marks.read()
        self._meter.add(values, result.counts, session.config.train.global_batch, data_wait, times)
        if values.applied:
            session.state.updates += 1
            if session.ema is not None:
                session.ema.update(session.state.updates)
            self._unjudged = (result, values.loss)
        if result.replaced_costs:
            self._recorder.note(f"non-finite matching costs were replaced: {result.replaced_costs[0]}")
        if self._due(result.step):
            self.write_line(values, result.step)
        self._compare_ranks(times, result.step)
        self._guard(result, values)

    def loss_share(self) -> float:
        """This rank's share of the loss that `judge` wants to hear of next, NaN where there is none."""
        return math.nan if self._unjudged is None else self._unjudged[1]

    def judge(self, loss: float) -> None:
        """Hear the sum of all ranks' `loss_share`."""
        if self._unjudged is None:
            return
        (result, _), self._unjudged = self._unjudged, None
        if self._spikes.observe(loss):
            self.spike = self.spike or Spike(result.step, [key for keys in result.keys for key in keys])

    def close(self, step: int) -> None:
        """Settle, judge and write what is left, before something that depends on it; `step` steps are done."""
        self._judge_now()
        self.settle()
        self._judge_now()
        if self._meter.steps:
            self.write_line(None, step)

    def _judge_now(self) -> None:
        if self._session.config.guard.spike_factor and self._unjudged is not None:
            self.judge(float(comm.sum_array(np.array([self.loss_share()]))[0]))

    def write_line(self, values: StepValues | None, step: int) -> None:
        """Write the means of the steps since the last line; the norms are those of the last step, where it is known."""
        session, state = self._session, self._session.state
        factor = lr_factor(session.config.schedule, max(0, state.updates - 1), session.config.train.steps)
        more: dict[str, float | dict[str, float]] = {}
        if values is not None:
            more["grad_norm"] = values.grad_norm
            more["grad_norms"] = dict(zip(session.engine.group_names, values.group_norms, strict=True))
            if session.config.train.precision == "fp16":
                more["loss_scale"] = values.loss_scale
        if self._start_seconds is not None and not self._told_start:
            more["start_seconds"] = round(self._start_seconds, 3)
            self._told_start = True
        means = self._meter.read()
        self._recorder.step(step, means, updates=state.updates, lr=session.config.optimizer.lr * factor, **more)

    def _compare_ranks(self, times: StepTimes, step: int) -> None:
        config = self._session.config.train
        ranks = self._stragglers.add(times, counts=not is_profiled(config, step))
        if ranks is None:
            return
        self._recorder.event("ranks", step=step, **ranks.told())
        found = slowest(ranks, config.straggler_factor)
        if found is None:
            return
        host = host_of(found.rank)
        self._recorder.event("straggler", step=step, host=host, **asdict(found))
        self._recorder.note(straggler_sentence(found, host, step - config.straggler_every + 1, step))

    def _due(self, step: int) -> bool:
        return step % self._session.config.train.log_every == 0 or step == self._session.config.train.steps

    def _guard(self, result: StepResult, values: StepValues) -> None:
        if self.dead is not None:
            return  # the step that was under way when the run was found dead
        session, recorder = self._session, self._recorder
        reason = self._dead.observe(result.step, values.applied)
        if values.applied:
            return
        event = skip_report(
            values.terms,
            session.criterion.names,
            result.keys,
            values.group_norms,
            session.engine.group_names,
            rank=session.world.rank,
        )
        if event is not None:
            recorder.event("skipped", step=result.step, in_a_row=self._dead.in_a_row, **event)
            recorder.note(skip_sentence(result.step, self._dead.in_a_row, event))
        self.dead = self.dead or reason

    def stop_dead_run(self) -> None:
        """Leave a report and raise the GuardError that ends the run; all ranks together."""
        session, reason = self._session, str(self.dead)
        comm.on_first_rank(lambda: stop_dead_run(session.run, reason, self._dead, session.fence.write))
