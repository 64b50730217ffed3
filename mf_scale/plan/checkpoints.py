"""What a checkpoint takes on the disk, and a copy of it in the hosts' memory."""

from __future__ import annotations

from dataclasses import dataclass

from mf_scale.config.schema import Config
from mf_scale.plan.states import FP32, Tensors
from mf_scale.plan.written import Written


@dataclass(frozen=True)
class Checkpoints:
    """Bytes of tensors; the files' heads and the small files beside them come on top, some hundred KB."""

    weights: int
    """What every rank has whole, and at stage 3 the weights in the ranks' files."""
    moments: int
    average: int
    total: int
    kept: int
    """Checkpoints that lie in the run directory at once at most, besides those of checkpoint.keep_every."""
    first_rank: int
    """Host memory of rank 0's copy while it is written behind the training: as much as its files."""
    other_ranks: int
    """Of any other rank's at most."""


def count_checkpoints(tensors: Tensors, config: Config, written: Written) -> Checkpoints:
    """Of a run whose ranks write so much at the configured stage, heads included."""
    whole = tensors.saved
    trained, averaged = tensors.trained * FP32, config.ema.decay > 0
    moments = 2 * trained
    # Up to stage 2 the average is a state_dict of its own, at stage 3 stretches of what is trained.
    average = (trained if config.zero.stage == 3 else whole) * averaged
    copies = config.checkpoint.asynchronous
    return Checkpoints(
        weights=whole,
        moments=moments,
        average=average,
        total=whole + moments + average,
        # The one that is being written stands beside those that are kept.
        kept=config.checkpoint.keep_last + config.checkpoint.keep_best + 1,
        first_rank=written.first_rank * copies,
        other_ranks=written.other_rank * copies,
    )
