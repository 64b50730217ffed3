"""A loss that jumps: the run goes back to a checkpoint and leaves out the global batches it jumped at."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mf_scale.config.schema import GuardConfig
from mf_scale.data.state import DataState, leave_out
from mf_scale.distributed import comm
from mf_scale.errors import GuardError
from mf_scale.training.guard import shown_keys
from mf_scale.training.state import TrainState


class SpikeGuard:
    """Compares each step's loss with the median of those before it.

    The losses are the run's own list (`TrainState.losses`), kept up to date and saved: a run that was interrupted
    judges as one that was not, and one that went back as it did at its checkpoint.
    """

    def __init__(self, config: GuardConfig, losses: list[float]) -> None:
        self._config, self._losses = config, losses

    def observe(self, loss: float) -> bool:
        """Take note of the loss of a step that had an update (the same float on every rank); True for a spike."""
        config, losses = self._config, self._losses
        if not config.spike_factor or not math.isfinite(loss):
            return False
        if len(losses) >= config.spike_window:
            median = statistics.median(losses[-config.spike_window :])
            if median > 0 and loss > config.spike_factor * median:
                return True
        losses.append(loss)
        del losses[: -config.spike_window]
        return False


@dataclass(frozen=True)
class Rollback:
    """What a run that goes back takes along from where it was."""

    data: DataState
    """Its data order, the range left out."""
    rollbacks: list[dict[str, int]]
    """`TrainState.rollbacks`, this one included."""

    def apply(self, state: TrainState) -> None:
        """Into the state that a checkpoint gave."""
        state.data, state.rollbacks = self.data, list(self.rollbacks)


def plan_rollback(
    state: TrainState, config: GuardConfig, *, step: int, to: int, keys: Sequence[str], where: str
) -> Rollback:
    """Going back from a spike in step `step` (numbered from 1) to the checkpoint of `to` steps.

    Of the range that is left out half lies before the spike's batch (`first_left_out`): a loss shows what the updates
    before it did.
    All ranks call it: GuardError where the run has gone back `spike_rollbacks` times before, with the spike's samples,
    whose `keys` rank 0 needs alone.
    """
    if len(state.rollbacks) >= config.spike_rollbacks:
        before = ", ".join(str(rollback["step"]) for rollback in state.rollbacks)
        times = f"{len(state.rollbacks)} {'time' if len(state.rollbacks) == 1 else 'times'}"
        error = GuardError(
            f"the loss of step {step} is above {config.spike_factor:g} times the median of the {config.spike_window} "
            f"before it, and the run has gone back {times} already (spikes at step {before}); "
            f"now with samples {shown_keys(keys)}",
            where=where,
            remedy=f"Lower optimizer.lr, look at `mf-scale replay {where} --step {step}`, or raise guard.spike_factor "
            "or guard.spike_rollbacks.",
        )
        raise comm.agreed(error)
    record = {"step": step, "to": to, "skipped": config.spike_skip}
    left_out = leave_out(state.data, first_left_out(config, step), config.spike_skip)
    return Rollback(left_out, [*state.rollbacks, record])


def first_left_out(config: GuardConfig, step: int) -> int:
    """The first global batch (from 0) that is left out for a spike in step `step` (from 1), whose own is step - 1."""
    return max(0, step - 1 - config.spike_skip // 2)
