"""Repeat: repeat-factor sampling (Gupta et al. 2019, LVIS) as arithmetic, epochs of constant length.

Sample i has the factor r_i = max(1, sqrt(t / f)), f being the share of images that hold the rarest of its classes.
With R the running sum of the factors, it comes floor(R_i + u) - floor(R_(i-1) + u) times in an epoch of remainder u:
systematic sampling, so r_i times on average and never less than once. Sums are whole numbers of 1/UNIT, and the total
is brought up to whole copies, so that every epoch has the same length and every machine draws the same copies. Kept are
the sums at block bounds; inside a block they are made again from the index.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mf_scale.data.index import Index

UNIT = 1 << 16
_CHUNK = 1 << 18
"""Samples whose factors are summed at once."""


@dataclass(frozen=True)
class RepeatFactors:
    """Repeat factors of a source, over the blocks of its order."""

    index: Index
    class_factors: np.ndarray
    """int64 [K], in units."""
    bounds: np.ndarray
    """First sample of every block and N behind them, int64 [blocks+1]."""
    sums: np.ndarray
    """R before each of those, in units, int64 [blocks+1]."""
    added: int
    """Units that bring the total up to whole copies, spread evenly over the samples."""

    @property
    def length(self) -> int:
        """Copies of an epoch."""
        return int(self.sums[-1]) // UNIT

    def copies_before(self, remainder: int) -> np.ndarray:
        """Copies before every block in an epoch with this remainder in units, int64 [blocks+1]."""
        return (self.sums + remainder) // UNIT

    def samples_of(self, copies: np.ndarray, starts: np.ndarray, remainder: int) -> np.ndarray:
        """The sample that each copy of an epoch is of, int64, same shape; `starts` is `copies_before(remainder)`."""
        samples = np.empty_like(copies)
        blocks = np.searchsorted(starts, copies, side="right") - 1
        for block in np.unique(blocks):
            here = blocks == block
            first, end = int(self.bounds[block]), int(self.bounds[block + 1])
            behind = self.sums[block] + np.cumsum(self._factors(first, end)) + remainder
            samples[here] = first + np.searchsorted(behind // UNIT, copies[here], side="right")
        return samples

    def _factors(self, first: int, end: int) -> np.ndarray:
        """Factors of samples first..end with what is added to each, in units, int64."""
        added = np.diff(np.arange(first, end + 1) * self.added // self.index.samples)
        return sample_factors(self.index, self.class_factors, first, end) + added


def repeat_factors(index: Index, threshold: float, bounds: np.ndarray) -> RepeatFactors:
    """Factors of a source with t = `threshold` > 0 over blocks that begin at `bounds`, int64 [blocks+1]."""
    by_class = class_factors(index.class_counts(), index.samples, threshold)
    sums = np.zeros(len(bounds), np.int64)
    before = 0
    for first in range(0, index.samples, _CHUNK):
        end = min(first + _CHUNK, index.samples)
        running = before + np.cumsum(sample_factors(index, by_class, first, end))
        here = (bounds > first) & (bounds <= end)
        sums[here] = running[bounds[here] - first - 1]
        before = int(running[-1])
    added = -before % UNIT
    return RepeatFactors(index, by_class, bounds, sums + bounds * added // index.samples, added)


def class_factors(images: np.ndarray, samples: int, threshold: float) -> np.ndarray:
    """max(1, sqrt(t / f)) of every class in units, int64 [K]; `images` [K] hold it, of `samples` in all."""
    share = np.maximum(images, 1) / samples
    return np.round(np.maximum(1.0, np.sqrt(threshold / share)) * UNIT).astype(np.int64)


def sample_factors(index: Index, by_class: np.ndarray, first: int, end: int) -> np.ndarray:
    """The largest factor of each sample's classes, UNIT where it has none, int64 [end - first]."""
    offsets, labels = index.class_lists(first, end)
    values = np.append(by_class[labels], UNIT)  # for empty lists at the end, which reduceat takes an element for
    factors = np.maximum.reduceat(values, offsets[:-1])
    return np.where(offsets[1:] > offsets[:-1], factors, UNIT)
