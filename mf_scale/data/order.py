"""Order: which samples form global batch `step`.

Pure arithmetic on (segment, step): no rank, worker, file or clock enters. The stream of a source is the
concatenation of its epoch permutations; window e is the stretch of the stream from G*floor(eN/G) to
G*floor((e+1)N/G), cut into G equal lanes, and step k of the window takes the k-th sample of every lane. So a
lane is read front to back, and the position of a run is one integer.

N samples of the source, G global batch. A stream position is epoch * N + offset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

ROUNDS = 8
"""Rounds of the Feistel network: enough for an even spread on the smallest blocks too."""
KEPT_EPOCHS = 4
"""Epochs whose block order is kept in memory; a step touches one or two of them unless G > N."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a run over which the order has one law."""

    first_step: int
    """The step it begins at."""
    first_epoch: int
    """The epoch that step begins; the segments of a run count their epochs on."""
    digest: str
    """Digest of the index: which samples, in which shards."""
    samples: int
    """N."""
    seed: int
    global_batch: int
    """G."""
    block_samples: int
    shuffle: str
    """blocks | full"""
    offset: int = 0
    """Global batches of its stream that lie before first_step: taken under an earlier segment, or left out."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Segment:
        return Segment(**data)


def batches_before(segment: Segment, step: int) -> int:
    """Global batches of the segment's stream that lie before `step`."""
    return step - segment.first_step + segment.offset


def window(segment: Segment, step: int) -> tuple[int, int, int]:
    """The window that holds `step`: (stream position it starts at, its steps, the number of `step` in it)."""
    N, G = segment.samples, segment.global_batch
    taken = batches_before(segment, step)
    epoch = -(-(taken + 1) * G // N) - 1  # the first epoch whose window ends behind this step
    first, end = epoch * N // G, (epoch + 1) * N // G
    return segment.first_epoch * N + G * first, end - first, taken - first


def positions(segment: Segment, step: int) -> np.ndarray:
    """Stream positions of the G lanes at `step`, int64 [G]."""
    start, steps, number = window(segment, step)
    return start + np.arange(segment.global_batch, dtype=np.int64) * steps + number


def epochs_begun(segment: Segment, step: int) -> int:
    """Epochs of the segment's stream that have been begun before `step`."""
    return -(-batches_before(segment, step) * segment.global_batch // segment.samples)


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


def block_bounds(shard_samples: Sequence[int], block_samples: int) -> np.ndarray:
    """First sample of every block and N behind them, int64 [blocks+1]; a block never crosses a shard."""
    starts: list[np.ndarray] = []
    first = 0
    for samples in shard_samples:
        blocks = -(-samples // block_samples)
        starts.append(first + np.arange(blocks, dtype=np.int64) * samples // max(blocks, 1))
        first += samples
    return np.concatenate([*starts, np.array([first], dtype=np.int64)])


class SampleOrder:
    """Stream position -> sample id of one segment; remembers the block order of the epochs last asked for."""

    def __init__(self, segment: Segment, shard_samples: Sequence[int]) -> None:
        self.segment = segment
        self.bounds = block_bounds(shard_samples, segment.block_samples)
        if int(self.bounds[-1]) != segment.samples:
            raise ValueError(f"the shards hold {self.bounds[-1]} samples, the segment says {segment.samples}")
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def sample_ids(self, stream_positions: np.ndarray) -> np.ndarray:
        """Sample ids (their order in the index) at the given stream positions, int64, same shape."""
        epochs, offsets = np.divmod(np.asarray(stream_positions, dtype=np.int64), self.segment.samples)
        ids = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._epoch_ids(int(epoch), offsets[here])
        return ids

    def blocks(self, sample_ids: np.ndarray) -> np.ndarray:
        """Block of each sample, int64."""
        return np.searchsorted(self.bounds, sample_ids, side="right") - 1

    def _epoch_ids(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        seed, samples = self.segment.seed, self.segment.samples
        if self.segment.shuffle == "full":
            return permute(offsets, samples, key(seed, epoch, 0))
        order, ends = self._block_order(epoch)
        slots = np.searchsorted(ends, offsets, side="right")
        blocks = order[slots]
        sizes = self.bounds[blocks + 1] - self.bounds[blocks]
        inside = offsets - (ends[slots] - sizes)
        return self.bounds[blocks] + permute(inside, sizes, key(seed, epoch, blocks + 1))

    def _block_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks in the epoch's order, and the offset behind each of them."""
        if epoch not in self._epochs:
            if len(self._epochs) >= KEPT_EPOCHS:
                self._epochs.pop(min(self._epochs))
            count = len(self.bounds) - 1
            order = permute(np.arange(count), count, key(self.segment.seed, epoch, 0))
            self._epochs[epoch] = order, np.cumsum(self.bounds[order + 1] - self.bounds[order])
        return self._epochs[epoch]


def key(seed: int, epoch: int, part: np.ndarray | int) -> np.ndarray:
    """Key of one permutation, uint64 of the shape of `part`."""
    mixed = _mix(np.array([seed % (1 << 64)], dtype=np.uint64))
    mixed = _mix(mixed ^ np.array([epoch], dtype=np.uint64))
    return _mix(mixed ^ np.atleast_1d(np.asarray(part)).astype(np.uint64))


def permute(index: np.ndarray, size: np.ndarray | int, keys: np.ndarray) -> np.ndarray:
    """Where `index` goes in the keyed permutation of range(size), int64; element-wise over arrays.

    A Feistel network on the smallest square domain that holds `size`, walked until the value lies inside, so a
    permutation of any length costs no memory.
    """
    index, size, keys = np.broadcast_arrays(
        np.asarray(index).astype(np.uint64), np.asarray(size).astype(np.uint64), keys
    )
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1]
    half = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    value = _feistel(index, half, keys)
    while (outside := value >= size).any():
        value[outside] = _feistel(value[outside], half[outside], keys[outside])
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half: np.ndarray, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(number))) & mask)
    return (left << half) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that spreads every bit."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
