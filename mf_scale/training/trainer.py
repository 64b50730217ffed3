"""The training loop."""

from __future__ import annotations

import gc
import time
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mf_scale import faults
from mf_scale.config.load import config_to_dict
from mf_scale.config.schema import Config
from mf_scale.data.batch import Batch
from mf_scale.data.loader import train_steps
from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.distributed.same_program import refuse_mixture
from mf_scale.errors import EXIT_STOPPED, StoppedOnRequest, UserError
from mf_scale.training.evaluating import Evaluate
from mf_scale.training.garbage import held_off_the_step
from mf_scale.training.ledger import Ledger, Spike
from mf_scale.training.looks import Looks
from mf_scale.training.preemption import StopFlag
from mf_scale.training.profiling import profiled
from mf_scale.training.recorder import Recorder, open_recorder
from mf_scale.training.samples import record_samples, samples_in_hand
from mf_scale.training.saver import Saver
from mf_scale.training.schedule import lr_factor
from mf_scale.training.session import Session, open_session
from mf_scale.training.spike import Rollback
from mf_scale.training.step import Agreement, StepResult, agree, train_step
from mf_scale.training.turning_back import turn_back
from mf_scale.training.watchdog import Watchdog, watched


def train(config: Config, world: World, flag: StopFlag, evaluate: Evaluate | None = None) -> None:
    """Join the ranks, refuse a mixture of programs, then `train_run`."""
    meeting, timeout = Path(config.run_dir), config.train.collective_timeout
    with (
        watched(config, world) as watchdog,
        comm.process_group(world, timeout=timeout, meeting=meeting) as device,
    ):
        refuse_mixture(world, config_to_dict(config))
        train_run(config, world, device, flag, watchdog, evaluate)


def train_run(
    config: Config,
    world: World,
    device: torch.device,
    flag: StopFlag,
    watchdog: Watchdog,
    evaluate: Evaluate | None = None,
) -> None:
    """Train or go on training `config.run_dir` to its last step, evaluated by `evaluate` on its way (none: not).

    Raises StoppedOnRequest once a requested stop is committed, UserError for a mistake, GuardError when going on
    would spoil the run.
    """
    rollback: Rollback | None = None
    while True:
        watchdog.alive("start", 0)
        faults.reach("start", rank=world.rank, step=0)
        # Later a step's agreement hears of it, which saves first: a rollback is in no checkpoint yet.
        if rollback is None and comm.sum_array(np.array([int(flag.wanted)]))[0]:  # asked while the program was starting
            comm.barrier()
            raise StoppedOnRequest
        with open_session(config, world, device, rollback) as session, open_recorder(session) as recorder:
            watchdog.opened(session.start, samples_in_hand(session))
            end = _run(session, recorder, flag, watchdog, evaluate)
            watchdog.alive("end", session.state.step)
            # Together: the first exit code that srun sees makes it end the other ranks.
            comm.barrier()
            if end == "stop":
                raise StoppedOnRequest
            rollback = turn_back(session, recorder, end) if isinstance(end, Spike) else None
        if rollback is None:
            return
        # Weights, moments and pinned memory of the session that ended make room for those of the next.
        del session, recorder, end
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _run(
    session: Session, recorder: Recorder, flag: StopFlag, watchdog: Watchdog, evaluate: Evaluate | None
) -> str | Spike:
    """Train until the last step ("done"), until the ranks agree to stop ("stop") or until a loss jumps."""
    saver = Saver(session, recorder, lambda: watchdog.alive("save", session.state.step))
    ledger = Ledger(session, recorder)
    if session.state.step >= session.config.train.steps:
        recorder.note(f"nothing to do: {session.state.step:,} of {session.config.train.steps:,} steps are done")
    comm.together(saver.prepare)
    if session.rolled_back:
        saver.save()
    looks = Looks(session, recorder, saver, flag, watchdog, evaluate)
    stopped = _run_steps(session, recorder, saver, ledger, looks, flag, watchdog)
    if ledger.halted:
        saver.finish()
    if ledger.dead is not None:
        ledger.stop_dead_run()
    if ledger.spike is not None:
        return ledger.spike
    saver.save_last()
    reason = (flag.reason or "asked through another rank") if stopped else "done"
    recorder.event("stop", reason=reason, exit_code=EXIT_STOPPED if stopped else 0)
    return "stop" if stopped else "done"


def _run_steps(
    session: Session,
    recorder: Recorder,
    saver: Saver,
    ledger: Ledger,
    looks: Looks,
    flag: StopFlag,
    watchdog: Watchdog,
) -> bool:
    """Take steps until the last one (False), until the ranks agree to stop (True) or `ledger.halted`."""
    config, state = session.config, session.state
    faults.reach("train.first", rank=session.world.rank, step=state.step)
    # What a stop interrupted is made up for.
    ledger.pause(looks.validate())
    ledger.pause(looks.evaluate(partial(_adds, session, saver, ledger)))
    with (
        closing(_stream(session, flag)) as stream,
        held_off_the_step(config.train.gc_every) as collector,
        profiled(session, recorder, watchdog) as profiler,
    ):
        while state.step < config.train.steps:
            profiler.begin_step()
            watchdog.alive("data", state.step + 1)
            batch, waited, failure = _next_batch(session, stream, recorder)
            session.phases.batch_there(waited)
            watchdog.alive("step", state.step + 1)
            agreement = agree(
                batch,
                session.criterion,
                stop=flag.wanted or batch is None,
                save=saver.due_by_time(),
                written=saver.written(),
                failed=failure is not None,
                loss=ledger.loss_share(),
                world=session.world,
            )
            ledger.judge(agreement.loss)
            if agreement.written:
                saver.commit()
            if agreement.failed or agreement.stop or agreement.save:
                ledger.close(state.step)
            if ledger.halted:
                return False
            if agreement.failed:
                saver.save()
                saver.finish()
                comm.together(partial(_raise, failure))
            if agreement.stop:
                return True
            if agreement.save and _adds(session, saver, ledger):
                ledger.pause(saver.save())
            assert batch is not None  # else the step had failed, or the ranks had agreed to stop
            ledger.book(_train_step(session, batch, agreement, ledger), waited)
            state.step += 1
            state.samples += config.train.global_batch
            recorder.tick()
            faults.reach("train.step", rank=session.world.rank, step=state.step)
            record_samples(session, recorder, saver, batch, agreement.quarantined)
            collector.collect_if_due(state.step)
            ledger.pause(profiler.end_step(looks=looks.due))
            if state.step == config.train.steps or looks.due or _save_due(session):
                ledger.close(state.step)
            if ledger.halted:
                return False
            ledger.pause(looks.validate())
            if _best_here(session) or (_save_due(session) and _adds(session, saver, ledger)):
                ledger.pause(saver.save())
            ledger.pause(looks.evaluate(partial(_adds, session, saver, ledger)))
    if comm.sum_array(np.array([int(recorder.failure is not None)]))[0]:
        saver.save_last()
        comm.together(lambda: _raise(recorder.failure))
    return looks.due


def _next_batch(
    session: Session, stream: Generator[tuple[int, Batch], None, None], recorder: Recorder
) -> tuple[Batch | None, float, UserError | None]:
    """This rank's next batch, on its way to the device; the seconds it waited; why this rank cannot go on, if so.

    No batch and no failure: a stop was asked for while the data kept it waiting.
    """
    began = time.perf_counter()
    batch, failure = None, recorder.failure
    try:
        _, batch = next(stream, (session.state.step, None))
        if batch is not None:
            session.transfer.start(batch, session.plan.micro_batch)
    except UserError as error:
        failure = error
    return batch, time.perf_counter() - began, failure


def _raise(failure: UserError | None) -> None:
    if failure is not None:
        raise failure


def _stream(session: Session, flag: StopFlag) -> Generator[tuple[int, Batch], None, None]:
    return train_steps(
        session.sources,
        session.state.data,
        session.config.data,
        rank=session.world.rank,
        world=session.world.size,
        step=session.state.step,
        give_up=lambda: flag.wanted,
    )


def _train_step(session: Session, batch: Batch, agreement: Agreement, ledger: Ledger) -> StepResult:
    config, state = session.config, session.state

    def factor() -> float:
        ledger.settle()  # the rate follows the updates, of which the step before may have been one
        return lr_factor(config.schedule, state.updates, config.train.steps)

    return train_step(
        session.engine,
        session.criterion,
        batch,
        agreement,
        transfer=session.transfer,
        statistics=session.statistics,
        phases=session.phases,
        plan=session.plan,
        world=session.world,
        seed=config.seed,
        step=state.step,
        lr_factor=factor,
    )


def _save_due(session: Session) -> bool:
    every = session.config.checkpoint.every_steps
    return bool(every) and session.state.step % every == 0


def _best_here(session: Session) -> bool:
    """The validation at this step was the best so far, and its checkpoint is to be kept."""
    best = session.state.best
    return session.config.checkpoint.keep_best and best is not None and best[0] == session.state.step


def _adds(session: Session, saver: Saver, ledger: Ledger) -> bool:
    """Whether a checkpoint would hold other weights than the newest one.

    Within a row of steps without an update each one would push out the checkpoints from before.
    """
    return not ledger.dead_row or saver.newest < session.state.step - ledger.dead_row
