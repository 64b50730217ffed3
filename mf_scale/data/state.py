"""Data state: the list of segments a run goes through. The position itself is the step.

A run opens segments where it stands. One that went back to a checkpoint may also hold segments that begin ahead of it:
those leave out a range of the streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mf_scale.data.order import Segment, Stream, epochs_begun
from mf_scale.errors import UserError

LAW = {
    "count": "its samples in a global batch",
    "seed": "the seed",
    "block_samples": "data.block_samples",
    "shuffle": "data.shuffle",
    "repeat_threshold": "data.repeat_threshold",
    "labels": "the classes its images are repeated by",
}
"""What makes the stream of a source another one, as a message names it."""


@dataclass(frozen=True)
class SourcePart:
    """A source as a run wants to read it."""

    name: str
    """As messages call it."""
    digest: str
    """Of the index."""
    samples: int
    length: int
    """Positions of an epoch: `samples`, or more where some are repeated."""
    count: int
    """Samples of it in every global batch."""
    labels: str = ""
    """Digest of the mapped labels that repeats are counted by; empty: they are the packed ones."""


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
    def from_dict(data: Mapping[str, Any], *, where: str = "") -> DataState:
        """Raises UserError where the data is not what `to_dict` made."""
        try:
            if any("streams" not in segment for segment in data["segments"]):
                raise UserError(
                    "an earlier version of this program wrote the data state",
                    where=where,
                    remedy="Take the run's weights into a new run_dir: train.init_from=RUN.",
                )
            state = DataState(tuple(Segment.from_dict(s) for s in data["segments"]))
            if not state.segments or not all(segment.streams for segment in state.segments):
                raise ValueError("it has no segment, or one without a stream")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the data state cannot be read: {error}", where=where, remedy="It is damaged.") from error
        return state


def open_segment(
    state: DataState | None,
    step: int,
    parts: Sequence[SourcePart],
    *,
    seed: int,
    block_samples: int,
    shuffle: str,
    repeat_threshold: float,
) -> tuple[DataState, str | None]:
    """The state to go on with at `step`, and what changes there in words, where something does.

    A source whose law stays the same goes on where it stands, whatever happens to the others. One with another law goes
    on at its next epoch, so that no epoch mixes two orders; the message says how many samples stay unread. One that was
    there before and comes back goes on behind what was read of it. Ranges that were to be left out after `step` belong
    to the old order and go with it.
    """

    def begin(part: SourcePart, source: int, origin: int, first_epoch: int) -> Stream:
        facts = part.digest, part.samples, part.length, part.count
        return Stream(source, *facts, seed, block_samples, shuffle, repeat_threshold, origin, first_epoch, part.labels)

    past = _last_streams(state, step)
    running = {s.digest for s in state.at(step).streams} if state else set()
    streams, changes = [], []
    unused = max((stream.source for stream, _ in past.values()), default=-1) + 1
    for part in parts:
        if part.digest not in past:
            streams.append(begin(part, unused, step, 0))
            changes.append(f"{part.name} begins")
            unused += 1
            continue
        last, end = past[part.digest]
        same = begin(part, last.source, last.origin, last.first_epoch)
        if same == last and part.digest in running:
            streams.append(last)
            continue
        begun = epochs_begun(last, end)
        streams.append(begin(part, last.source, step, last.first_epoch + begun))
        changes.append(_change(part, last, same, end, begun))
    gone = [stream for digest, (stream, _) in past.items() if digest in running - {p.digest for p in parts}]
    changes += [f"the source {stream.digest[:12]} ends" for stream in gone]
    if state is None:
        return DataState((Segment(step, tuple(streams)),)), None
    if not changes:
        return _while_same_law(state, step), None
    opened = Segment(step, tuple(sorted(streams, key=lambda stream: stream.source)))
    message = f"From step {step} the order of the data changes: {'; '.join(changes)}."
    return DataState((*(s for s in state.segments if s.first_step <= step), opened)), message


def _while_same_law(state: DataState, step: int) -> DataState:
    """The state without segments of another law ahead of `step`, which a run that went back from them still holds."""
    now = _law(state.at(step))
    ahead = [s.first_step for s in state.segments if s.first_step > step and _law(s) != now]
    return DataState(tuple(s for s in state.segments if s.first_step < min(ahead))) if ahead else state


def _law(segment: Segment) -> list[Stream]:
    """What a segment reads, wherever its streams stand."""
    return [replace(stream, origin=0, first_epoch=0) for stream in segment.streams]


def _last_streams(state: DataState | None, step: int) -> dict[str, tuple[Stream, int]]:
    """Of every source that the run has read before `step`, by digest: its last stream and the step that ended at."""
    past: dict[str, tuple[Stream, int]] = {}
    segments = [s for s in state.segments if s.first_step <= step] if state else []
    ends = [*(s.first_step for s in segments), step][1:]
    for segment, end in zip(segments, ends, strict=False):
        past |= {stream.digest: (stream, end) for stream in segment.streams}
    return past


def _change(part: SourcePart, last: Stream, wanted: Stream, end: int, begun: int) -> str:
    changed = [what for name, what in LAW.items() if getattr(last, name) != getattr(wanted, name)]
    unread = begun * last.length - (end - last.origin) * last.count
    return (
        f"{part.name} ({', '.join(changed) or 'it comes back'}) goes on at the start of its epoch "
        f"{last.first_epoch + begun}, and {unread} samples of the one before stay unread"
    )


def leave_out(state: DataState, first: int, count: int) -> DataState:
    """The same streams without `count` global batches: step `first` takes what step `first + count` would have taken.

    Nothing changes for the steps before `first`, so a run that went back to a checkpoint goes on with it.
    """
    earlier = [s for s in state.segments if s.first_step < first]
    at_first = replace(_earlier(state.at(first + count), count), first_step=first)
    later = [_earlier(s, count) for s in state.segments if s.first_step > first + count]
    return DataState((*earlier, at_first, *later))


def _earlier(segment: Segment, count: int) -> Segment:
    """The segment with everything in it `count` steps earlier."""
    streams = tuple(replace(stream, origin=stream.origin - count) for stream in segment.streams)
    return Segment(segment.first_step - count, streams)
