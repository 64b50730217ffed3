"""What a checkpoint takes on the disk, and a copy of it in the hosts' memory."""

from __future__ import annotations

from dataclasses import dataclass

from mf_scale.config.schema import Config
from mf_scale.plan.states import FP32, Tensors


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
    """Host memory of rank 0's copy while it is written behind the training."""
    other_ranks: int
    """Of any other rank's."""


def count_checkpoints(tensors: Tensors, config: Config, ranks: int) -> Checkpoints:
    """Of a run of so many ranks."""
    whole = tensors.saved
    trained, averaged = tensors.trained * FP32, config.ema.decay > 0
    frozen = sum(tensors.frozen) * FP32
    moments = 2 * trained
    partitioned = config.zero.stage == 3
    # Up to stage 2 the average is a state_dict of its own, at stage 3 stretches of what is trained.
    average = (trained if partitioned else whole) * averaged
    replicated = whole - trained - frozen if partitioned else whole + average
    shares = moments + (trained + frozen + average if partitioned else 0)
    share = -(-shares // ranks)
    copies = config.checkpoint.asynchronous
    return Checkpoints(
        weights=whole,
        moments=moments,
        average=average,
        total=whole + moments + average,
        # The one that is being written stands beside those that are kept.
        kept=config.checkpoint.keep_last + config.checkpoint.keep_best + 1,
        first_rank=(replicated + share) * copies,
        other_ranks=share * copies,
    )
