"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from functools import partial
from typing import Any

from mf_scale.config.schema import Config
from mf_scale.data.batch import Batch
from mf_scale.data.loader import train_steps
from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.errors import GuardError, StoppedOnRequest, UserError
from mf_scale.training.meter import Meter
from mf_scale.training.preemption import StopFlag
from mf_scale.training.recorder import Recorder, open_recorder
from mf_scale.training.saver import Saver
from mf_scale.training.schedule import lr_factor
from mf_scale.training.session import Session, open_session
from mf_scale.training.step import Agreement, StepResult, agree, train_step
from mf_scale.training.validation import validation_loss


def train(config: Config, world: World, flag: StopFlag) -> None:
    """Train or go on training `config.run_dir` to its last step.

    Raises StoppedOnRequest once a requested stop is committed, UserError for a mistake, GuardError when going on
    would spoil the run.
    """
    with (
        comm.process_group(world, timeout=config.train.collective_timeout) as device,
        open_session(config, world, device) as session,
    ):
        with open_recorder(session) as recorder:
            stopped = _run(session, recorder, flag)
        # Together: the first exit code that srun sees makes it end the other ranks.
        comm.barrier()
        if stopped:
            raise StoppedOnRequest


def _run(session: Session, recorder: Recorder, flag: StopFlag) -> bool:
    saver = Saver(session, recorder)
    if session.state.step >= session.config.train.steps:
        recorder.note(f"nothing to do: {session.state.step:,} of {session.config.train.steps:,} steps are done")
    stopped = _run_steps(session, recorder, saver, flag)
    saver.save_last()
    reason = (flag.reason or "asked through another rank") if stopped else "done"
    recorder.event("stop", reason=reason)
    return stopped


def _run_steps(session: Session, recorder: Recorder, saver: Saver, flag: StopFlag) -> bool:
    """Take steps until the last one (False) or until the ranks agree to stop (True)."""
    config, state = session.config, session.state
    meter = Meter(session.device, session.criterion)
    skipped_in_a_row = 0
    # A validation that a stop interrupted is made up for.
    meter.pause(_validate_if_due(session, recorder, flag))
    with closing(_stream(session)) as stream:
        while state.step < config.train.steps:
            batch, waited, failure = _next_batch(stream, recorder)
            agreement = agree(
                batch,
                session.criterion,
                stop=flag.wanted,
                save=saver.due_by_time(),
                failed=failure is not None,
            )
            if agreement.failed or agreement.stop:
                _log(session, recorder, meter)
            if agreement.failed:
                saver.save()
                comm.together(partial(_raise, failure))
            if agreement.stop:
                return True
            if agreement.save:
                _log(session, recorder, meter)
                meter.pause(saver.save())
            assert batch is not None  # else the step had failed
            result = _train_step(session, batch, agreement)
            meter.add(result, config.train.global_batch, waited)
            state.step += 1
            state.samples += config.train.global_batch
            state.updates += result.outcome.applied
            _record_samples(session, recorder, batch, agreement)
            skipped_in_a_row = 0 if result.outcome.applied else skipped_in_a_row + 1
            _guard(session, recorder, result, skipped_in_a_row)
            if state.step % config.train.log_every == 0 or state.step == config.train.steps:
                _log(session, recorder, meter, grad_norm=result.outcome.grad_norm)
            recorder.tick()
            meter.pause(_validate_if_due(session, recorder, flag))
            if config.checkpoint.every_steps and state.step % config.checkpoint.every_steps == 0:
                _log(session, recorder, meter)
                meter.pause(saver.save())
    comm.together(lambda: _raise(recorder.failure))
    return _validation_due(session)


def _next_batch(
    stream: Generator[tuple[int, Batch], None, None], recorder: Recorder
) -> tuple[Batch | None, float, UserError | None]:
    """This rank's next batch, the seconds it waited, and why this rank cannot go on, if so."""
    began = time.perf_counter()
    batch, failure = None, recorder.failure
    try:
        _, batch = next(stream)
    except UserError as error:
        failure = error
    return batch, time.perf_counter() - began, failure


def _raise(failure: UserError | None) -> None:
    if failure is not None:
        raise failure


def _stream(session: Session) -> Generator[tuple[int, Batch], None, None]:
    return train_steps(
        session.index,
        session.state.data,
        session.config.data,
        seed=session.config.seed,
        rank=session.world.rank,
        world=session.world.size,
        step=session.state.step,
    )


def _train_step(session: Session, batch: Batch, agreement: Agreement) -> StepResult:
    config, state = session.config, session.state
    return train_step(
        session.engine,
        session.criterion,
        batch,
        agreement,
        plan=session.plan,
        world=session.world,
        seed=config.seed,
        step=state.step,
        device=session.device,
        lr_factor=lr_factor(config.schedule, state.updates, config.train.steps),
    )


def _record_samples(session: Session, recorder: Recorder, batch: Batch, agreement: Agreement) -> None:
    """Write quarantined samples and, where wanted, the step's keys; stop when too many samples are bad."""
    config, state = session.config, session.state
    if agreement.quarantined:
        state.quarantined += agreement.quarantined
        for event in _flat(comm.gather_objects([e for e in batch.events if e.get("event") == "quarantine"])):
            recorder.event("quarantine", **{name: value for name, value in event.items() if name != "event"})
            recorder.note(f"quarantined {event.get('key')} in {event.get('shard')}: {event.get('reason')}")
        share = state.quarantined / max(state.samples, session.index.samples)
        if share > config.data.max_bad_fraction:
            what = f"{state.quarantined} samples could not be decoded, {share:.2%} of what was read"
            where = f"{config.data.train}, data.max_bad_fraction = {config.data.max_bad_fraction}"
            remedy = "Run `python -m data_tools verify` on the source; metrics.jsonl names every sample."
            raise comm.agreed(GuardError(what, where=where, remedy=remedy))
    if config.data.log_keys:
        keys = _flat(comm.gather_objects(batch.keys))
        recorder.event("keys", keys=keys)


def _flat(parts: list[list[Any]] | None) -> list[Any]:
    """Ranks' lists as one; empty on the ranks that gather nothing."""
    return [item for part in parts or () for item in part]


def _guard(session: Session, recorder: Recorder, result: StepResult, skipped_in_a_row: int) -> None:
    if result.replaced_costs:
        recorder.note(f"non-finite matching costs were replaced: {result.replaced_costs[0]}")
    if skipped_in_a_row == 0:
        return
    recorder.event("skipped", in_a_row=skipped_in_a_row)
    recorder.note(f"step {session.state.step}: gradients were not finite, no update ({skipped_in_a_row} in a row)")
    if skipped_in_a_row >= session.config.train.max_skipped_steps:
        what = f"{skipped_in_a_row} steps in a row had non-finite gradients: the run is dead"
        where = f"step {session.state.step} of {session.run.path}"
        remedy = "Lower optimizer.lr or use train.precision=fp32; the last committed checkpoint is intact."
        raise comm.agreed(GuardError(what, where=where, remedy=remedy))


def _log(session: Session, recorder: Recorder, meter: Meter, grad_norm: float | None = None) -> None:
    """Write the means of the steps since the last line, if any; also early, before what they tell could be lost."""
    config, state = session.config, session.state
    if meter.steps:
        factor = lr_factor(config.schedule, max(0, state.updates - 1), config.train.steps)
        recorder.step(meter.read(), updates=state.updates, lr=config.optimizer.lr * factor, grad_norm=grad_norm)


def _validation_due(session: Session) -> bool:
    every, state = session.config.eval.every_steps, session.state
    here = bool(every) and state.step > 0 and state.step % every == 0
    return here and session.validation is not None and state.validated < state.step


def _validate_if_due(session: Session, recorder: Recorder, flag: StopFlag) -> float:
    """Seconds it took. A stop in between leaves the validation due."""
    began = time.perf_counter()
    if _validation_due(session) and session.validation is not None:
        values = validation_loss(
            session.engine,
            session.criterion,
            session.validation,
            session.config,
            session.world,
            session.device,
            lambda: flag.wanted,
        )
        if values is not None:
            session.state.validated = session.state.step
            recorder.event("validation", **values)
            bad = f", without {values['undecodable']} samples that do not decode" if values["undecodable"] else ""
            recorder.note(f"step {session.state.step}: validation loss {values['loss']:.4g}{bad}")
    return time.perf_counter() - began
