"""Data state: the list of segments a run goes through. The position itself is the step.

A run opens segments where it stands. One that went back to a checkpoint may also hold segments that begin ahead of it:
those leave out a range of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mf_scale.data.order import Segment, batches_before, epochs_begun
from mf_scale.errors import UserError

IDENTITY = {
    "digest": "the index",
    "seed": "the seed",
    "global_batch": "the global batch",
    "block_samples": "data.block_samples",
    "shuffle": "data.shuffle",
}
"""What makes a segment another one, as a message names it."""


@dataclass(frozen=True)
class DataState:
    """Segments in the order they were opened."""

    segments: tuple[Segment, ...]

    def at(self, step: int) -> Segment:
        """The segment that rules `step`."""
        return next(s for s in reversed(self.segments) if s.first_step <= step)

    def to_dict(self) -> dict[str, Any]:
        return {"segments": [s.to_dict() for s in self.segments]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> DataState:
        """Raises UserError where the data is not what `to_dict` made."""
        try:
            state = DataState(tuple(Segment.from_dict(s) for s in data["segments"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"the data state cannot be read: {error}", remedy="The checkpoint is damaged.") from error
        return state


def open_segment(
    state: DataState | None,
    step: int,
    *,
    digest: str,
    samples: int,
    seed: int,
    global_batch: int,
    block_samples: int,
    shuffle: str,
) -> tuple[DataState, str | None]:
    """The state to go on with at `step`, and a sentence where the order changes there.

    The same identity leaves the state as it is. Another one opens a segment that starts at the next epoch, so
    that no epoch mixes two orders; the sentence says how many samples of the current epoch stay unread. Ranges that
    were to be left out after `step` belong to the old order and go with it.
    """
    wanted = Segment(step, 0, digest, samples, seed, global_batch, block_samples, shuffle)
    if state is None:
        return DataState((wanted,)), None
    last = state.at(step)
    changed = [what for name, what in IDENTITY.items() if getattr(last, name) != getattr(wanted, name)]
    if not changed:
        return state, None
    begun = epochs_begun(last, step)
    unread = begun * last.samples - batches_before(last, step) * last.global_batch
    first_epoch = last.first_epoch + begun
    opened = Segment(step, first_epoch, digest, samples, seed, global_batch, block_samples, shuffle)
    message = (
        f"From step {step} the order of the data changes ({', '.join(changed)}): it goes on at the start of epoch "
        f"{first_epoch}, and {unread} samples of epoch {first_epoch - 1} stay unread."
    )
    return DataState((*(s for s in state.segments if s.first_step <= step), opened)), message


def leave_out(state: DataState, first: int, count: int) -> DataState:
    """The same stream without `count` global batches: step `first` takes what step `first + count` would have taken.

    Nothing changes for the steps before `first`, so a run that went back to a checkpoint goes on with it.
    """
    resumes = state.at(first + count)
    at_first = replace(resumes, first_step=first, offset=batches_before(resumes, first + count))
    earlier = [s for s in state.segments if s.first_step < first]
    later = [replace(s, first_step=s.first_step - count) for s in state.segments if s.first_step > first + count]
    return DataState((*earlier, at_first, *later))
