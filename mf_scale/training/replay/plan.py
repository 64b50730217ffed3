"""What a step of a run was: its configuration, weights, data and cut, from what the run directory tells of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mf_scale.config.load import is_overridden
from mf_scale.config.schema import Config
from mf_scale.data.index import Index
from mf_scale.data.state import DataState
from mf_scale.errors import UserError
from mf_scale.rundir import RunDir
from mf_scale.training.past import look_back
from mf_scale.training.replay.cuts import Cut, cut_of, read_cuts
from mf_scale.training.state import TrainState

_CUT_BY = ("seed", "train.global_batch", "train.micro_batch", "data.shuffle", "data.block_samples")
"""Keys that make the batch what it was."""


@dataclass(frozen=True)
class ReplayPlan:
    """A step of a run, and what it can be repeated from."""

    run: RunDir
    step: int
    """As metrics.jsonl counts, from 1: global batch step - 1."""
    config: Config
    sources: tuple[Index, ...]
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
    _refuse_another_cut(overrides)
    past = look_back(path, step, overrides)
    state = past.saved or TrainState(step=0, updates=0, samples=0, quarantined=0, validated=0, data=past.data)
    return ReplayPlan(
        run=past.run,
        step=step,
        config=past.config,
        sources=past.sources,
        checkpoint=past.checkpoint,
        state=state,
        data=past.data,
        cuts=read_cuts(past.starts, past.checkpoint, state.step, state.data, past.config),
        loss_scale=past.facts.get("loss_scale"),
        recorded=next((r for r in past.records if r["event"] == "skipped" and r["step"] == step), None),
    )


def _refuse_another_cut(overrides: Sequence[str]) -> None:
    changed = [key for key in _CUT_BY if is_overridden(overrides, key)]
    if changed:
        raise UserError(
            f"{', '.join(changed)} would make it another batch than the run's",
            where="command line",
            remedy="Leave that out; other keys may be changed, for example train.precision=fp32.",
        )
