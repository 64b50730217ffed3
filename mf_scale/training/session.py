"""Everything a run works with, made in one place: data, model, engine, state; resumed where the run stood."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mf_scale.config.load import config_to_yaml
from mf_scale.config.schema import Config, ModelConfig
from mf_scale.config.validate import BatchPlan, check_vocabulary, plan_batch
from mf_scale.data.index import Index, verify_shards
from mf_scale.data.state import open_segment
from mf_scale.distributed import comm
from mf_scale.distributed.engine import Engine
from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.losses.criterion import Criterion
from mf_scale.models.maskformer import MaskFormer, build_model
from mf_scale.models.weights import load_weights
from mf_scale.rundir import (
    CONFIG,
    STATE,
    VOCABULARY,
    WEIGHTS,
    RunDir,
    disk_errors,
    newest_sound_checkpoint,
    read_json,
    resolve_checkpoint,
    write_atomically,
)
from mf_scale.training.checkpoint import sweep
from mf_scale.training.moments import read_moments
from mf_scale.training.optimizer import build_optimizer, group_table
from mf_scale.training.state import TrainState
from mf_scale.vocabulary import Vocabulary

_CHECKSUM_BYTES = 256 * 2**20
"""Sources up to this size are checked by digest before training, larger ones by the size of every shard."""


@dataclass
class Session:
    """A run that is ready to take its next step."""

    config: Config
    world: World
    device: torch.device
    run: RunDir
    plan: BatchPlan
    index: Index
    validation: Index | None
    engine: Engine
    criterion: Criterion
    state: TrainState
    settings: dict[str, str]
    """Texts of config.yaml and vocabulary.json by file name, for the checkpoints."""
    resumed: bool
    notes: list[str]
    """What a person should know about this start."""

    @property
    def queries(self) -> int:
        return self.config.model.decoder.queries


@contextmanager
def open_session(config: Config, world: World, device: torch.device) -> Iterator[Session]:
    """Build or resume the run of `config.run_dir`, holding its lock; raises UserError before anything is changed."""
    run = RunDir(Path(config.run_dir))
    lock: list[int] = []
    try:
        found = comm.on_first_rank(lambda: _prepare(config, run, world, lock))
        index = comm.together(lambda: Index.open(str(config.data.train)))
        checkpoint = Path(found["checkpoint"]) if found["checkpoint"] else None
        model = comm.together(lambda: _build_model(config, index.vocabulary, checkpoint))
        optimizer = build_optimizer(model, config.optimizer)
        plan = plan_batch(config, world.size)
        groups = group_table(optimizer.param_groups)
        engine = Engine(model.to(device), optimizer, config, plan, world)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            notes = [*found["notes"], f"attention: {model.attention_kernel}", groups]
        state, message = _state(config, index, checkpoint)
        if checkpoint is not None:
            engine.prepare_moments(state.updates)
            comm.together(lambda: read_moments(engine.needed_fragments(), checkpoint))
        yield Session(
            config=config,
            world=world,
            device=device,
            run=run,
            plan=plan,
            index=index,
            validation=Index.open(config.data.val) if config.data.val else None,
            engine=engine,
            criterion=Criterion(config.loss, config.matching, len(index.vocabulary)),
            state=state,
            settings={CONFIG: config_to_yaml(config), VOCABULARY: json.dumps(index.vocabulary.to_dict(), indent=1)},
            resumed=checkpoint is not None,
            notes=[*notes, *([message] if message else [])],
        )
    finally:
        for handle in lock:
            os.close(handle)


def _prepare(config: Config, run: RunDir, world: World, lock: list[int]) -> dict[str, Any]:
    """On rank 0: every check that needs the data or the disk, then the run directory. What the others must know."""
    if not config.data.train:
        raise UserError(
            "data.train is not set", remedy="Name a source that `python -m data_tools pack` wrote: data.train=FOLDER."
        )
    plan_batch(config, world.size)
    index = Index.open(config.data.train)
    check_vocabulary(config, index.vocabulary, where=config.data.train)
    verify_shards(index, checksums=sum(shard.size for shard in index.shards) <= _CHECKSUM_BYTES)
    if config.data.val:
        _check_validation(Index.open(config.data.val), index, config.data.val)
    lock.append(_lock(run))
    with disk_errors(run.path):
        run.checkpoints.mkdir(exist_ok=True)
    notes = [f"removed the unfinished {name}" for name in sweep(run)]
    checkpoint, damaged = newest_sound_checkpoint(run)
    if damaged and checkpoint is None:
        raise UserError(
            f"no checkpoint of this run is sound: {' '.join(damaged)}",
            where=str(run.path),
            remedy="Restore one, or start a new run_dir (train.init_from can take weights from elsewhere).",
        )
    write_atomically(run.config, config_to_yaml(config))
    write_atomically(run.vocabulary, json.dumps(index.vocabulary.to_dict(), indent=1))
    return {"checkpoint": str(checkpoint) if checkpoint else None, "notes": [*damaged, *notes]}


def _check_validation(validation: Index, index: Index, where: str) -> None:
    if validation.vocabulary.digest != index.vocabulary.digest:
        raise UserError(
            f"the validation source has vocabulary {validation.vocabulary.name!r} "
            f"({len(validation.vocabulary)} classes), the training source {index.vocabulary.name!r} "
            f"({len(index.vocabulary)} classes)",
            where=where,
            remedy="Pack both with the same vocabulary.",
        )
    verify_shards(validation, checksums=False)


def _build_model(config: Config, vocabulary: Vocabulary, checkpoint: Path | None) -> MaskFormer:
    """The model with the weights of the checkpoint, of `train.init_from`, or of its backbone's pretraining."""
    source = checkpoint / WEIGHTS if checkpoint else None
    if source is None and config.train.init_from:
        _, folder = resolve_checkpoint(config.train.init_from)
        source = folder / WEIGHTS
    model = build_model(_bare(config.model) if source else config.model, len(vocabulary), seed=config.seed)
    if source is not None:
        load_weights(model, source)
    return model


def _bare(config: ModelConfig) -> ModelConfig:
    """Without the backbone's pretrained weights, which would be overwritten at once."""
    from dataclasses import replace

    return replace(config, backbone=replace(config.backbone, weights="none"))


def _state(config: Config, index: Index, checkpoint: Path | None) -> tuple[TrainState, str | None]:
    saved = TrainState.from_dict(read_json(checkpoint / STATE)) if checkpoint else None
    data, message = open_segment(
        saved.data if saved else None,
        saved.step if saved else 0,
        digest=index.digest,
        samples=index.samples,
        seed=config.seed,
        global_batch=config.train.global_batch,
        block_samples=config.data.block_samples,
        shuffle=config.data.shuffle,
    )
    if saved is None:
        return TrainState(step=0, updates=0, samples=0, quarantined=0, data=data), message
    saved.data = data
    return saved, message


def _lock(run: RunDir) -> int:
    """Take the run directory's lock, held until the process ends: two trainings in one directory spoil each other."""
    with disk_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(run.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(handle, 200, 0).decode(errors="replace").split()
        os.close(handle)
        raise UserError(
            f"another process is training in this run directory (pid and host: {' '.join(holder)})",
            where=str(run.path),
            remedy="Wait for it or stop it, or choose another run_dir.",
        ) from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    return handle
