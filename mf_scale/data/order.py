"""Order: which samples form global batch `step`.

Pure arithmetic on (segment, step): no rank, worker, file or clock enters. Every source has a stream of its own, the
concatenation of its epochs, each a permutation; a global batch takes a fixed number of samples of each stream.
Window e of a stream is its stretch from G*floor(eN/G) to G*floor((e+1)N/G), cut into G equal lanes, and step k of the
window takes the k-th sample of every lane. So a lane is read front to back, and the position of a run is one integer.

N positions of an epoch (samples, or copies of them where long tails are repeated), G samples of the source in a global
batch. A stream position is epoch * N + offset. The lanes of a global batch are those of its first stream, then those of
the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mf_scale.data.blocks import block_bounds
from mf_scale.data.permutation import key, permute, permute_all
from mf_scale.data.repeat import UNIT, RepeatFactors

KEPT_EPOCHS = 2
"""Epochs whose block order is kept in memory; a step touches one or two of them unless G > N."""
_SOURCE_SPREAD = 0x9E3779B97F4A7C15
"""Sets the seeds of a run's sources apart; the first source's is the run's own."""
_CHUNK = 1 << 15
"""Blocks whose sizes are looked at at once."""
_REMAINDER = 1 << 62
"""Part of the key that the remainder of an epoch's repeats is drawn with; no block has this number."""


@dataclass(frozen=True)
class Stream:
    """One source's part of the global batches, under one law."""

    source: int
    """Its number in the run: never used for another source, so nothing random is drawn twice."""
    digest: str
    """Of the index: which samples, in which shards."""
    samples: int
    length: int
    """N: positions of an epoch, `samples` or more where some are repeated."""
    count: int
    """G: samples of it in every global batch."""
    seed: int
    """The run's."""
    block_samples: int
    shuffle: str
    """blocks | full"""
    repeat_threshold: float
    """Of repeat-factor sampling; 0: every sample once an epoch."""
    origin: int
    """The step that takes the stream's first global batch; below the first step it rules where some were left out."""
    first_epoch: int
    """The epoch that begins there; the streams of a source count their epochs on."""
    labels: str = ""
    """Digest of the mapped labels that repeats are counted by; empty: they are the packed ones."""

    @property
    def own_seed(self) -> int:
        """Seed of everything random about this source, 0 <= seed < 2**64."""
        return (self.seed + self.source * _SOURCE_SPREAD) % (1 << 64)


@dataclass(frozen=True)
class Segment:
    """A stretch of a run over which global batches are made in one way."""

    first_step: int
    """The step it begins at."""
    streams: tuple[Stream, ...]
    """By source number."""

    @cached_property
    def global_batch(self) -> int:
        """Samples of a global batch."""
        return sum(stream.count for stream in self.streams)

    def split(self, lanes: np.ndarray) -> Iterator[tuple[Stream, np.ndarray]]:
        """The streams that some ascending lanes of the global batch belong to, and which of each stream's own lanes."""
        first = 0
        for stream in self.streams:
            here = lanes[(lanes >= first) & (lanes < first + stream.count)]
            if len(here):
                yield stream, here - first
            first += stream.count

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        for stream in data["streams"]:
            if not stream["labels"]:
                del stream["labels"]
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Segment:
        return Segment(int(data["first_step"]), tuple(Stream(**stream) for stream in data["streams"]))


def window(stream: Stream, step: int) -> tuple[int, int, int]:
    """The window that holds `step`: (stream position it starts at, its steps, the number of `step` in it)."""
    N, G = stream.length, stream.count
    taken = step - stream.origin
    epoch = -(-(taken + 1) * G // N) - 1  # the first epoch whose window ends behind this step
    first, end = epoch * N // G, (epoch + 1) * N // G
    return stream.first_epoch * N + G * first, end - first, taken - first


def positions(stream: Stream, step: int) -> np.ndarray:
    """Stream positions of the G lanes of a source at `step`, int64 [G]."""
    start, steps, number = window(stream, step)
    return start + np.arange(stream.count, dtype=np.int64) * steps + number


def epochs_begun(stream: Stream, step: int) -> int:
    """Epochs of a stream that have been begun before `step`."""
    return -(-(step - stream.origin) * stream.count // stream.length)


def rank_lanes(global_batch: int, rank: int, world: int) -> np.ndarray:
    """Lanes of one rank, int64 [G/W]: r, r+W, … Raises ValueError where W does not divide G."""
    if global_batch % world:
        raise ValueError(f"world size {world} does not divide the global batch {global_batch}")
    return np.arange(rank, global_batch, world, dtype=np.int64)


@dataclass(frozen=True)
class WorkerShare:
    """What one of a rank's workers makes: these lanes, at steps first, first + stride, … from where it starts."""

    lanes: np.ndarray
    first: int
    stride: int


def worker_share(lanes: np.ndarray, worker: int, workers: int) -> WorkerShare:
    """Share of a worker: a run of lanes, read for good; with fewer lanes than workers, every workers-th step whole.

    Taken in worker order, the parts of a step join in lane order.
    """
    if len(lanes) < workers:
        return WorkerShare(lanes, worker, workers)
    return WorkerShare(np.array_split(lanes, workers)[worker], 0, 1)


class SampleOrder:
    """Stream position -> sample id of one stream; remembers the block order of the epochs last asked for.

    `repeats` are the source's repeat factors over the same blocks, where the stream has a threshold.
    """

    def __init__(
        self,
        stream: Stream,
        shard_samples: Sequence[int] | np.ndarray,
        repeats: RepeatFactors | None = None,
        bounds: np.ndarray | None = None,
    ) -> None:
        self.stream = stream
        self.bounds = block_bounds(shard_samples, stream.block_samples) if bounds is None else bounds
        self.repeats = repeats
        if int(self.bounds[-1]) != stream.samples:
            raise ValueError(f"the shards hold {self.bounds[-1]} samples, the stream says {stream.samples}")
        if (repeats.length if repeats else stream.samples) != stream.length:
            raise ValueError("the repeat factors are not those of the stream")
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def sample_ids(self, stream_positions: np.ndarray) -> np.ndarray:
        """Sample ids (their order in the index) at the given stream positions, int64, same shape."""
        epochs, offsets = np.divmod(np.asarray(stream_positions, dtype=np.int64), self.stream.length)
        ids = np.empty_like(offsets)
        for epoch in sorted(set(epochs.ravel().tolist())):  # np.unique's first call imports for 8 ms
            here = epochs == epoch
            ids[here] = self._epoch_ids(epoch, offsets[here])
        return ids

    def _epoch_ids(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        seed = self.stream.own_seed
        remainder = 0 if self.repeats is None else int(key(seed, epoch, _REMAINDER)[0] % np.uint64(UNIT))
        if self.stream.shuffle == "full":
            copies = permute(offsets, self.stream.length, key(seed, epoch, 0))
            return copies if self.repeats is None else self.repeats.samples_of(copies, remainder)
        order, ends = self._block_order(epoch, remainder)
        slots = np.searchsorted(ends, offsets, side="right")
        blocks = order[slots].astype(np.int64)
        starts = self._copies_before(blocks, remainder)
        sizes = self._copies_before(blocks + 1, remainder) - starts
        inside = offsets - (ends[slots] - sizes)
        copies = starts + permute(inside, sizes, key(seed, epoch, blocks + 1))
        return copies if self.repeats is None else self.repeats.samples_of(copies, remainder)

    def _copies_before(self, blocks: np.ndarray | slice, remainder: int) -> np.ndarray:
        """Copies before each of these blocks in an epoch with this remainder of repeats, int64."""
        return self.bounds[blocks] if self.repeats is None else self.repeats.copies_before(blocks, remainder)

    def _block_order(self, epoch: int, remainder: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks in the epoch's order, int32 where they fit, and the offset behind each of them, int64."""
        if epoch not in self._epochs:
            if len(self._epochs) >= KEPT_EPOCHS:
                self._epochs.pop(min(self._epochs))
            order = permute_all(len(self.bounds) - 1, key(self.stream.own_seed, epoch, 0))
            self._epochs[epoch] = order, self._ends(order, remainder)
        return self._epochs[epoch]

    def _ends(self, order: np.ndarray, remainder: int) -> np.ndarray:
        """The offset behind each of the blocks in their order, int64; in parts, since fresh memory costs more."""
        sizes = np.empty(len(order), np.int32)  # half as much to be picked from at random
        for first in range(0, len(order), _CHUNK):
            np.copyto(
                sizes[first : first + _CHUNK],
                np.diff(self._copies_before(np.s_[first : first + _CHUNK + 1], remainder)),
                casting="same_kind",
            )
        ends, before = np.empty(len(order), np.int64), 0
        for first in range(0, len(order), _CHUNK):
            here = ends[first : first + _CHUNK]
            np.cumsum(sizes.take(order[first : first + _CHUNK], mode="clip"), dtype=np.int64, out=here)
            here += before
            before = int(here[-1])
        return ends
