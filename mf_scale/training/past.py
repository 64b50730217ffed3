"""What a run was at a step: configuration, sources and data order, from what its directory tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mf_scale.config.consent import refuse_unasked_code
from mf_scale.config.load import load_config
from mf_scale.config.schema import Config
from mf_scale.config.validate import check_vocabulary, validate
from mf_scale.data.index import Index
from mf_scale.data.sources import continue_order, open_training
from mf_scale.data.state import DataState
from mf_scale.errors import UserError
from mf_scale.rundir import (
    CONFIG,
    STATE,
    RunDir,
    checkpoint_step,
    committed_checkpoints,
    existing_run,
    read_json,
)
from mf_scale.tracking.metrics import read_metrics
from mf_scale.training.guard import sound_checkpoint_before
from mf_scale.training.state import TrainState


@dataclass(frozen=True)
class Past:
    """A run as it was when a step was taken, or as it will be when one is."""

    run: RunDir
    config: Config
    sources: tuple[Index, ...]
    checkpoint: Path | None
    """The newest sound one before the step; none: the run's beginning."""
    facts: dict[str, Any]
    """The checkpoint's state.json; empty without one."""
    saved: TrainState | None
    """The state in it."""
    data: DataState
    """The order as it was when the step was taken."""
    records: list[dict[str, Any]]
    """All of metrics.jsonl."""

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The `start` records, in the order the run was started."""
        return _starts(self.records)


def look_back(path: str, step: int, overrides: Sequence[str]) -> Past:
    """What the run in `path` was at step `step`, which metrics.jsonl counts from 1; UserError where nothing tells."""
    run = RunDir(existing_run(path))
    records = read_metrics(run.metrics)
    starts = _starts(records)
    start = next((r for r in reversed(starts) if r["step"] < step), None)
    checkpoint = sound_checkpoint_before(run, step)
    if start is None and checkpoint is None:
        raise UserError(
            f"nothing here tells of step {step}: no start of the run in metrics.jsonl, no checkpoint before it",
            where=path,
            remedy="Name a run directory that `mf-scale train` wrote.",
        )
    config = _config(run, step, checkpoint, overrides, newest=not starts or start is starts[-1])
    if step > config.train.steps:
        raise UserError(f"the run has {config.train.steps} steps, there is no step {step}", where=path)
    sources = open_training(config.data)
    named = ", ".join(index.source for index in sources)
    check_vocabulary(config, sources[0].vocabulary, where=named)
    facts = read_json(checkpoint / STATE) if checkpoint else {}
    saved = TrainState.from_dict(facts) if facts else None
    told = DataState.from_dict(start["data"], where=str(run.metrics)) if start and "data" in start else None
    known = told or (saved.data if saved else None)
    have = {index.digest for index in sources}
    if known is not None and any(stream.digest not in have for stream in known.at(step - 1).streams):
        raise UserError(
            "the source is not the one that the run was trained on: its index has another digest",
            where=named,
            remedy="Name the run's own source with data.train=FOLDER, or all of them in data.sources.",
        )
    data = told or continue_order(config, sources, known, saved.step if saved else 0)[0]
    return Past(run, config, sources, checkpoint, facts, saved, data, records)


def _starts(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in records if r["event"] == "start"]


def _config(run: RunDir, step: int, checkpoint: Path | None, overrides: Sequence[str], *, newest: bool) -> Config:
    """The configuration the step was taken under: the run's own one for its newest start, else a checkpoint's."""
    behind = [folder for folder in reversed(committed_checkpoints(run)) if checkpoint_step(folder) >= step]
    near = behind[0] if behind else checkpoint
    file = run.config if near is None or (newest and run.config.is_file()) else near / CONFIG
    config = load_config(file, overrides)
    validate(config)
    refuse_unasked_code(config, overrides, file)
    return config
