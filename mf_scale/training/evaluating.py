"""mIoU, PQ and AP of the validation source in the middle of a training.

A second model with the weights of this moment is evaluated, by code that is handed in (a training does not know what
an evaluation is). So the training's own model, its statistics, its generators and DeepSpeed see nothing of it, and at
every ZeRO stage it is the model that `evaluate` makes of a checkpoint of the step.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from mf_scale import faults
from mf_scale.config.schema import Config
from mf_scale.data.index import Index
from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.errors import GuardError, UserError
from mf_scale.fragments import AVERAGE, WEIGHT
from mf_scale.models.build import build_model
from mf_scale.models.logit_adjustment import adjust_logits
from mf_scale.models.text_head import CLASS_ROWS
from mf_scale.rundir import RunDir
from mf_scale.training.fence import Fence
from mf_scale.training.recorder import Recorder
from mf_scale.training.saver import Saver
from mf_scale.training.session import Session
from mf_scale.training.watchdog import EVALUATION, Watchdog


class Evaluate(Protocol):
    """An evaluation of a model in eval mode, whose results lie in the run directory when it returns."""

    def __call__(
        self,
        model: nn.Module,
        index: Index,
        config: Config,
        world: World,
        *,
        run: RunDir,
        fence: Fence,
        step: int,
        stop: Callable[[], bool],
    ) -> dict[str, Any] | None:
        """What stands in RUN/report/evaluation-val.json, on all ranks; None where `stop`, asked on all ranks before
        every image, was true on one."""


def evaluation_due(session: Session, evaluate: Evaluate | None) -> bool:
    """The present step has an evaluation that is not made yet."""
    every, state = session.config.eval.metrics_every_steps, session.state
    here = bool(every) and state.step > 0 and state.step % every == 0
    return here and evaluate is not None and session.validation is not None and state.evaluated < state.step


def evaluate_now(
    session: Session,
    recorder: Recorder,
    saver: Saver,
    watchdog: Watchdog,
    evaluate: Evaluate,
    stop_wanted: Callable[[], bool],
    adds: Callable[[], bool],
) -> float:
    """Evaluate the present weights on all ranks; seconds it took. A stop in between leaves the evaluation due.

    Checkpoints go on meanwhile, where one `adds` to those that there are. An evaluation that fails (a sample that does
    not decode, a full disk) is told and does not end the run; a GuardError does: the run is another start's by now.
    """
    began, state, config = time.perf_counter(), session.state, session.config
    assert session.validation is not None
    if comm.sum_array(np.array([int(stop_wanted())]))[0]:
        return 0.0
    watchdog.alive(EVALUATION, state.step)
    faults.reach("train.evaluation", rank=session.world.rank, step=state.step)
    turn = -1

    def stop() -> bool:
        nonlocal turn
        turn += 1
        watchdog.alive(EVALUATION, state.step, turn)
        recorder.tick()
        faults.reach("evaluation.image", rank=session.world.rank, step=state.step)
        save, written = comm.sum_array(np.array([saver.due_by_time(), saver.written()], dtype=np.int64)).tolist()
        if written == session.world.size:
            saver.commit()
        if save and saver.newest < state.step and adds():
            saver.save()
            watchdog.alive(EVALUATION, state.step, turn)
        return stop_wanted()

    results, problem = None, None
    with _undisturbed(session.device):
        model = present_model(session)
        told: dict[str, Any] = {"run": session.run, "fence": session.fence, "step": state.step, "stop": stop}
        try:
            results = evaluate(model, session.validation, config, session.world, **told)
        except GuardError:  # FencedError on the rank that found it, GuardError on those that heard of it
            raise
        except UserError as error:
            problem = error.with_traceback(None)  # its frames would hold the device's memory
        del model
    if problem is not None:
        state.evaluated = state.step
        recorder.event("evaluation_failed", reason=problem.what, where=problem.where, remedy=problem.remedy)
        recorder.note(f"step {state.step:,}: the evaluation failed, the run goes on: {problem}")
        recorder.alert("evaluation failed", str(problem))
    elif results is not None:
        state.evaluated = state.step
        recorder.evaluation(results)
        numbers = {name: results.get(name) for name in ("mIoU", "PQ", "AP")}
        shown = ", ".join(f"{name} {100 * value:.2f}" for name, value in numbers.items() if value is not None)
        seconds = time.perf_counter() - began
        recorder.note(f"step {state.step:,}: {shown} on {results['samples']:,} images in {seconds:.0f} s")
    return time.perf_counter() - began


def present_model(session: Session) -> nn.Module:
    """A model of its own with the present weights, those that eval.weights names, in eval mode on the device."""
    config = session.config.model
    bare = replace(config, backbone=replace(config.backbone, weights="none"))
    rows = session.engine.replicated().get(CLASS_ROWS)  # not from their file, which may be gone by now
    rows = None if rows is None else rows.cpu()
    model = build_model(bare, len(session.vocabulary), seed=session.config.seed, class_rows=rows)
    use_average = session.ema is not None and session.validated == "ema"
    _load_present(session, model, use_average)
    adjust_logits(model, session.counted, session.config.eval.logit_adjustment, where="the training sources")
    return model.to(session.device).eval()


@torch.no_grad()
def _load_present(session: Session, model: nn.Module, use_average: bool) -> None:
    """Copy whole tensors, gather at stage 3 those that the ranks hold stretches of, share rank 0's buffers."""
    engine, ema = session.engine, session.ema
    own = model.state_dict()
    given = ema.state() if use_average and ema is not None and engine.stage < 3 else engine.replicated()
    for name, value in given.items():
        own[name].copy_(value)
    if engine.stage == 3:
        owned = {f.name: (f.start, f.values[WEIGHT]) for f in engine.owned_fragments() if WEIGHT in f.values}
        average = ema.fragments() if use_average and ema is not None else ()
        stretches = owned | {f.name: (f.start, f.values[AVERAGE]) for f in average}
        for name in engine.shapes():
            flat = torch.zeros(own[name].numel(), device=session.device)
            if name in stretches:
                start, values = stretches[name]
                flat[start : start + values.numel()] = values.to(session.device)
            own[name].copy_(comm.sum_in_place(flat).view_as(own[name]))
    comm.broadcast_tensors([buffer for buffer in model.buffers() if buffer.is_floating_point()])


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """A block that leaves the generators as they were, with Python's collector at work, and the GPU's memory tidy."""
    generators = random.getstate(), np.random.get_state()
    collecting, tried = gc.isenabled(), torch.backends.cudnn.benchmark
    gc.enable()
    # Every image has a size of its own: each would be tried anew, and the choice is a matter of time, not of numbers.
    torch.backends.cudnn.benchmark = False
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.backends.cudnn.benchmark = tried
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        gc.collect()
        if not collecting:
            gc.disable()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # images of all sizes have cut it into pieces of all sizes
