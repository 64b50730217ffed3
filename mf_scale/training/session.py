"""Everything a run works with, made in one place: data, model, engine, state; resumed where the run stood."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from mf_scale.config.load import config_to_yaml
from mf_scale.config.schema import Config
from mf_scale.config.validate import BatchPlan, plan_batch, plan_note
from mf_scale.data.index import Index
from mf_scale.data.sources import continue_order, describe_sources, open_training, open_validation
from mf_scale.distributed import comm
from mf_scale.distributed.engine import Engine
from mf_scale.distributed.env import World
from mf_scale.fragments import partition_file, read_fragments
from mf_scale.kernels.choose import choose_kernels, fallback_reason
from mf_scale.losses.choose import choose_criterion
from mf_scale.losses.terms import StepLoss
from mf_scale.models.build import serving_kernel
from mf_scale.rundir import CONFIG, STATE, VOCABULARY, RunDir, read_json
from mf_scale.training.compiling import compile_model
from mf_scale.training.contents import contents
from mf_scale.training.ema import Ema
from mf_scale.training.fence import LOCK, Fence
from mf_scale.training.initial import initial_model
from mf_scale.training.lock import let_go
from mf_scale.training.optimizer import build_optimizer, group_table
from mf_scale.training.phases import Phases
from mf_scale.training.precision import autocast, set_numerics
from mf_scale.training.preflight import examine, refuse_unshared, settle
from mf_scale.training.snapshot import FileContents
from mf_scale.training.spike import Rollback
from mf_scale.training.state import TrainState
from mf_scale.training.statistics import MovingStatistics
from mf_scale.training.transfer import Transfer
from mf_scale.vocabulary import Vocabulary


@dataclass
class Session:
    """A run that is ready to take its next step."""

    config: Config
    world: World
    device: torch.device
    run: RunDir
    fence: Fence
    """Whether this start may still write into the run directory."""
    start: int
    """Its number in the run directory, from 1; each session takes a new one."""
    plan: BatchPlan
    sources: tuple[Index, ...]
    """Of the training data; they have one vocabulary."""
    validation: Index | None
    engine: Engine
    ema: Ema | None
    """The moving average of the weights, where the run keeps one."""
    transfer: Transfer
    statistics: MovingStatistics
    phases: Phases
    criterion: StepLoss
    counted: Vocabulary
    """The vocabulary with the training images of each class, as the checkpoints have it."""
    state: TrainState
    settings: dict[str, str]
    """Texts of config.yaml and vocabulary.json by file name, for the checkpoints."""
    resumed: bool
    rolled_back: bool
    """It went back from a spike just now, which no checkpoint knows yet."""
    notes: list[str]
    """What a person should know about this start."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the training data."""
        return self.sources[0].vocabulary

    @property
    def samples(self) -> int:
        """Images of all training sources."""
        return sum(index.samples for index in self.sources)

    def contents(self) -> list[FileContents]:
        """The files of a checkpoint that this rank writes."""
        return contents(self.engine, self.ema, self.world)

    @property
    def validated(self) -> str:
        """Which weights are validated: ema where the run keeps an average, else raw."""
        return "ema" if self.ema is not None and self.config.eval.weights != "raw" else "raw"

    def validated_weights(self) -> AbstractContextManager[None]:
        """A block in which the model has the weights that are validated."""
        return self.ema.in_place() if self.ema is not None and self.validated == "ema" else nullcontext()


@contextmanager
def open_session(
    config: Config, world: World, device: torch.device, rollback: Rollback | None = None
) -> Iterator[Session]:
    """Build or resume the run of `config.run_dir`, holding its lock; raises UserError before anything is changed.

    After a `rollback` it goes on from the newest checkpoint with the data order that the rollback planned.
    """
    run = RunDir(Path(config.run_dir))
    lock: list[int] = []
    engine: Engine | None = None
    try:
        numerics = set_numerics(config, device)
        found = comm.on_first_rank(lambda: examine(config, run, world, lock))
        fence = Fence(run.path / LOCK, found["token"])
        comm.together(lambda: refuse_unshared(run, fence, world))
        sources = comm.together(lambda: open_training(config.data))
        vocabulary = sources[0].vocabulary
        checkpoint = Path(found["checkpoint"]) if found["checkpoint"] else None
        damaged = [Path(folder) for folder in found["damaged"]]
        init_from = Path(found["init_from"]) if found["init_from"] else None
        counted = vocabulary.with_images(found["class_images"])
        model, started_with = comm.together(lambda: initial_model(config, vocabulary, checkpoint, init_from))
        optimizer = build_optimizer(model, config.optimizer)
        plan = plan_batch(config, world.size)
        groups = group_table(optimizer.param_groups)
        if config.model.compile:
            comm.together(lambda: compile_model(model, device))
        kernels = comm.together(lambda: _kernels(config, device))
        engine = Engine(model.to(device), optimizer, config, plan, world)
        ema = Ema(engine, config.ema.decay) if config.ema.decay else None
        notes = [
            *found["notes"],
            *started_with,
            *getattr(model.backbone, "notes", ()),
            *kernels,
            *numerics,
            *filter(None, [plan_note(config, plan)]),
            groups,
        ]
        state, message = comm.together(lambda: _state(config, sources, checkpoint, rollback))
        engine.prepare_moments(state.updates)
        if checkpoint is not None:
            comm.together(lambda: _read_tensors(engine, ema, checkpoint, world))
        settings = {CONFIG: config_to_yaml(config), VOCABULARY: json.dumps(counted.to_dict(), indent=1)}
        validation = comm.together(lambda: open_validation(config.data, vocabulary))
        notes += comm.on_first_rank(lambda: settle(run, fence, settings | found["texts"], damaged))
        yield Session(
            config=config,
            world=world,
            device=device,
            run=run,
            fence=fence,
            start=found["start"],
            plan=plan,
            sources=sources,
            validation=validation,
            engine=engine,
            ema=ema,
            transfer=Transfer(device),
            statistics=MovingStatistics(engine.module),
            phases=Phases(device, gathers=engine.stage == 3),
            criterion=choose_criterion(config, len(vocabulary), counted.images),
            counted=counted,
            state=state,
            settings=settings,
            resumed=checkpoint is not None,
            rolled_back=rollback is not None,
            notes=[*notes, *describe_sources(sources, state.data, state.step), *([message] if message else [])],
        )
    finally:
        if engine is not None:
            engine.close()
        let_go(lock)


def _read_tensors(engine: Engine, ema: Ema | None, checkpoint: Path, world: World) -> None:
    """Moments, average and loss scale of a checkpoint; its weights were the model's before it was wrapped."""
    wanted = chain(engine.needed_fragments(), ema.fragments() if ema is not None else ())
    read_fragments(wanted, checkpoint, own=partition_file(world.rank, world.size), average_from_weights=True)
    engine.loss_scale.load(read_json(checkpoint / STATE)["loss_scale"])


def _kernels(config: Config, device: torch.device) -> list[str]:
    """What serves attention, and matching and mask loss, which the baselines have not; why nothing faster does."""
    with autocast(device, config.train.precision):
        attention = f"attention: {serving_kernel(config.model.attention, device)}"
    if config.model.kind != "mask_classification":
        return [attention]
    asked = config.loss.kernels, device.type, torch.float32
    reason = fallback_reason(*asked)
    return [attention, f"matching and mask loss: {choose_kernels(*asked)}" + (f" ({reason})" if reason else "")]


def _state(
    config: Config, sources: tuple[Index, ...], checkpoint: Path | None, rollback: Rollback | None
) -> tuple[TrainState, str | None]:
    saved = TrainState.from_dict(read_json(checkpoint / STATE)) if checkpoint else None
    if rollback is not None:
        saved = saved or TrainState(step=0, updates=0, samples=0, quarantined=0, validated=0, data=rollback.data)
        rollback.apply(saved)
    step, known = (saved.step, saved.data) if saved else (0, None)
    data, message = continue_order(config, sources, known, step)
    if saved is None:
        return TrainState(step=0, updates=0, samples=0, quarantined=0, validated=0, data=data), message
    saved.data = data
    return saved, message
