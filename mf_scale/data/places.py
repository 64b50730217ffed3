"""Places: which sample each worker process is at, in memory that its parent sees even after it died."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

from mf_scale.data.index import Index

Note = Callable[[int, int], None]
"""Called with (number of the source, sample id) before a sample is read."""


class Places:
    """The last sample of every worker; written without a lock, since each has a place of its own."""

    def __init__(self, indexes: Sequence[Index], workers: int) -> None:
        self.indexes = tuple(indexes)
        self._numbers: Any = multiprocessing.RawArray("q", [-1, -1] * workers)

    def note(self, worker: int, source: int, sample_id: int) -> None:
        """In the worker: it goes on to this sample."""
        self._numbers[2 * worker] = source
        self._numbers[2 * worker + 1] = sample_id

    def describe(self, worker: int) -> str:
        """In the parent: shard and key of the worker's last sample in words, empty before the first."""
        source, sample_id = self._numbers[2 * worker : 2 * worker + 2]
        if sample_id < 0:
            return ""
        record = self.indexes[source].sample(sample_id)
        return f"its last sample is {record.key} in {record.shard} of {self.indexes[source].source}"
