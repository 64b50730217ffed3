"""Lanes of the loaders: how many a worker has of each source, and how many blocks of them it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mf_scale.data.order import worker_share


@dataclass(frozen=True)
class SourceLanes:
    """One source's lanes of a global batch."""

    lanes: int
    kept: int
    """Whose blocks are kept; samples of the others are read singly."""
    of_worker: int
    """Of the worker that has the most of them."""
    kept_of_worker: int

    @property
    def fits(self) -> bool:
        return self.kept == self.lanes


def look_at_lanes(counts: Sequence[int], ranks: int, workers: int, slots: int) -> tuple[SourceLanes, ...]:
    """By source with `counts` lanes of a global batch, where a worker keeps `slots` blocks of each.

    The lanes of a batch go around the ranks, a rank's in runs to its workers; with fewer lanes than workers every
    worker reads all of them, and here is counted as the only one.
    """
    lanes, workers = np.arange(sum(counts)), max(1, workers)
    of_rank = np.arange(-(-len(lanes) // ranks))
    shares = [worker_share(of_rank, worker, workers) for worker in range(workers)]
    lengths = [len(share.lanes) * (share.first == 0) for share in shares]
    worker = np.repeat(np.arange(workers), lengths)[lanes // ranks]
    reader = lanes % ranks * workers + worker
    source = np.repeat(np.arange(len(counts)), counts)
    held = np.bincount(reader * len(counts) + source, minlength=ranks * workers * len(counts)).reshape(-1, len(counts))
    kept = np.minimum(held, slots)
    return tuple(
        SourceLanes(count, int(kept[:, i].sum()), int(held[:, i].max()), int(kept[:, i].max()))
        for i, count in enumerate(counts)
    )
