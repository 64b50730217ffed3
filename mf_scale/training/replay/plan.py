"""What a step of a run was: its configuration, weights, data and cut, from what the run directory tells of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mf_scale.config.consent import refuse_unasked_code
from mf_scale.config.load import is_overridden, load_config
from mf_scale.config.schema import Config
from mf_scale.config.validate import check_vocabulary, validate
from mf_scale.data.index import Index
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
from mf_scale.training.replay.cuts import Cut, cut_of, read_cuts
from mf_scale.training.state import TrainState, continued_order

_CUT_BY = ("seed", "train.global_batch", "train.micro_batch", "data.shuffle", "data.block_samples")
"""Keys that make the batch what it was."""


@dataclass(frozen=True)
class ReplayPlan:
    """A step of a run, and what it can be repeated from."""

    run: RunDir
    step: int
    """As metrics.jsonl counts, from 1: global batch step - 1."""
    config: Config
    index: Index
    checkpoint: Path | None
    """None: the weights that the run started with."""
    state: TrainState
    """Of the checkpoint."""
    data: DataState
    """The order as it was when the step was taken."""
    cuts: tuple[Cut, ...]
    """Of every step behind the checkpoint, for `cut_of`."""
    loss_scale: list[float] | None
    """Of the checkpoint, as `LossScale.load` takes it."""
    recorded: dict[str, Any] | None
    """The `skipped` event of the step, if the run left one."""

    @property
    def cut(self) -> Cut:
        """How the ranks shared the step."""
        return cut_of(self.cuts, self.step)

    @property
    def behind(self) -> int:
        """Steps that the weights are older than those of the step."""
        return self.step - 1 - self.state.step


def plan_replay(path: str, step: int, overrides: Sequence[str]) -> ReplayPlan:
    """Find out what step `step` (from 1) of the run in `path` was; raises UserError for whatever is not there."""
    run = RunDir(existing_run(path))
    _refuse_another_cut(overrides)
    records = read_metrics(run.metrics)
    starts = [r for r in records if r["event"] == "start"]
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
    index = Index.open(str(config.data.train))
    check_vocabulary(config, index.vocabulary, where=str(config.data.train))
    facts = read_json(checkpoint / STATE) if checkpoint else {}
    saved = TrainState.from_dict(facts) if facts else None
    told = DataState.from_dict(start["data"]) if start and "data" in start else None
    known = told or (saved.data if saved else None)
    if known is not None and known.at(step - 1).digest != index.digest:
        raise UserError(
            "the source is not the one that the run was trained on: its index has another digest",
            where=str(config.data.train),
            remedy="Name the run's own source with data.train=FOLDER.",
        )
    data = told or continued_order(config, index, saved)[0]
    state = saved or TrainState(step=0, updates=0, samples=0, quarantined=0, validated=0, data=data)
    return ReplayPlan(
        run=run,
        step=step,
        config=config,
        index=index,
        checkpoint=checkpoint,
        state=state,
        data=data,
        cuts=read_cuts(starts, checkpoint, state.step, state.data, config),
        loss_scale=facts.get("loss_scale"),
        recorded=next((r for r in records if r["event"] == "skipped" and r["step"] == step), None),
    )


def _refuse_another_cut(overrides: Sequence[str]) -> None:
    changed = [key for key in _CUT_BY if is_overridden(overrides, key)]
    if changed:
        raise UserError(
            f"{', '.join(changed)} would make it another batch than the run's",
            where="command line",
            remedy="Leave that out; other keys may be changed, for example train.precision=fp32.",
        )


def _config(run: RunDir, step: int, checkpoint: Path | None, overrides: Sequence[str], *, newest: bool) -> Config:
    """The configuration the step was taken under: the run's own one for its newest start, else a checkpoint's."""
    behind = [folder for folder in reversed(committed_checkpoints(run)) if checkpoint_step(folder) >= step]
    near = behind[0] if behind else checkpoint
    file = run.config if near is None or (newest and run.config.is_file()) else near / CONFIG
    config = load_config(file, overrides)
    validate(config)
    refuse_unasked_code(config, overrides, file)
    return config
