"""Reader: sample id -> decoded sample, through block buffers, with quarantine of samples that do not decode."""

from __future__ import annotations

from typing import Any

import numpy as np

from mf_scale.data.decode import LABEL_VALUES, StoredSample, decode_sample
from mf_scale.data.index import Index
from mf_scale.data.mapping import mapped_sample
from mf_scale.data.samples import BadSample, RawSample, parse_sample
from mf_scale.errors import GuardError


class SampleReader:
    """Reads the samples of one index in one process.

    A lane reads its block once, whole, and keeps it until it moves to another block. Lanes inside the same block
    share it. A block that does not fit the byte budget beside those in use is not kept: its samples are read
    singly, which is slower and the same.
    """

    def __init__(self, index: Index, *, block_samples: int, budget: int, max_pixels: int) -> None:
        self.index = index
        self.bounds = index.block_bounds(block_samples)
        self.budget, self.max_pixels = budget, max_pixels
        self._table = None if index.labels is None else index.labels.ids.table(index.packed, LABEL_VALUES)
        self._keys = index.table.column("key").chunk(0)
        self._offset, self._size, self._shard = (index.column(name) for name in ("offset", "size", "shard"))
        self._buffers: dict[int, bytes] = {}
        self._block_of_lane: dict[int, int] = {}

    def load(self, sample_id: int, lane: int | None = None) -> tuple[StoredSample, list[dict[str, Any]]]:
        """The sample, or in place of one that does not decode the next good one of its block (in index order,
        around), with the quarantine event. GuardError where the whole block is bad.

        With a lane, its block is buffered; without, the sample is read singly.
        """
        block = self._block(sample_id)
        first, end = int(self.bounds[block]), int(self.bounds[block + 1])
        reason = ""
        for tried in range(end - first):
            candidate = first + (sample_id - first + tried) % (end - first)
            try:
                sample = self.decode(candidate, self._bytes(candidate, block, lane))
            except BadSample as bad:
                reason = reason or str(bad)
                continue
            return sample, [self.event(sample_id, reason, sample.key)] if tried else []
        record = self.index.sample(sample_id)
        raise GuardError(
            f"none of the {end - first} samples of a block decodes; the first fault: {reason}",
            where=f"{self.index.source}, {record.shard}, {record.key} at byte {record.offset}",
            remedy="Find what is wrong with `python -m data_tools verify`, and pack the source again.",
        )

    def load_exact(self, sample_id: int) -> StoredSample:
        """The sample itself; BadSample where it does not decode."""
        return self.decode(sample_id, self._read(sample_id, sample_id + 1))

    def members(self, sample_id: int, lane: int | None = None) -> RawSample:
        """The sample as it lies in its shard, read as by `load`; BadSample."""
        return self._parse(sample_id, self._bytes(sample_id, self._block(sample_id), lane))

    def decode(self, sample_id: int, data: bytes) -> StoredSample:
        """Bytes of a sample -> decoded sample with the labels of the index's vocabulary; BadSample."""
        raw, packed = self._parse(sample_id, data), self.index.packed
        sample = decode_sample(raw, len(packed), self.max_pixels, self._table)
        return sample if self.index.way is None else mapped_sample(sample, self.index.way)

    def event(self, sample_id: int, reason: str, replaced_by: str) -> dict[str, Any]:
        """The quarantine of a sample, as the metrics have it."""
        record = self.index.sample(sample_id)
        return {
            "event": "quarantine",
            "source": self.index.source,
            "shard": record.shard,
            "key": record.key,
            "offset": record.offset,
            "reason": reason,
            "replaced_by": replaced_by,
        }

    def _parse(self, sample_id: int, data: bytes) -> RawSample:
        return parse_sample(data, self._keys[sample_id].as_py(), self.index.labels)

    def _block(self, sample_id: int) -> int:
        return int(np.searchsorted(self.bounds, sample_id, side="right") - 1)

    def _bytes(self, sample_id: int, block: int, lane: int | None) -> bytes:
        if lane is None or not self._hold(block, lane):
            return self._read(sample_id, sample_id + 1)
        start = int(self._offset[sample_id] - self._offset[self.bounds[block]])
        return self._buffers[block][start : start + int(self._size[sample_id])]

    def _hold(self, block: int, lane: int) -> bool:
        """Move the lane to a block; true where its bytes are in memory."""
        left = self._block_of_lane.get(lane)
        if left != block:
            self._block_of_lane[lane] = block
            if left is not None and left not in self._block_of_lane.values():
                self._buffers.pop(left, None)
        if block not in self._buffers:
            first, end = int(self.bounds[block]), int(self.bounds[block + 1])
            span = int(self._offset[end - 1] + self._size[end - 1] - self._offset[first])
            if span + sum(map(len, self._buffers.values())) > self.budget:
                return False
            self._buffers[block] = self._read(first, end)
        return True

    def _read(self, first: int, end: int) -> bytes:
        """One ranged read of the samples first..end, which lie in one shard."""
        offset = int(self._offset[first])
        size = int(self._offset[end - 1] + self._size[end - 1]) - offset
        return self.index.storage.read(self.index.shards[int(self._shard[first])].name, offset, size)
