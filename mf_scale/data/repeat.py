"""Repeat: repeat-factor sampling (Gupta et al. 2019, LVIS) as arithmetic, epochs of constant length.

Sample i has the factor r_i = max(1, sqrt(t / f)), f being the share of images that hold the rarest of its classes.
With R the running sum of the factors, it comes floor(R_i + u) - floor(R_(i-1) + u) times in an epoch of remainder u:
systematic sampling, so r_i times on average and never less than once. Sums are whole numbers of 1/UNIT, and the total
is brought up to whole copies, so that every epoch has the same length and every machine draws the same copies. Kept are
the sums at block bounds and at every STRIDE samples; in between they are made again from the index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mf_scale.data.index import Index
from mf_scale.data.kept import kept_array
from mf_scale.data.mapping import mapped_lists

_BITS = 16
UNIT = 1 << _BITS
_CHUNK = 1 << 18
"""Samples whose factors are summed at once."""
STRIDE = 16
"""Samples between two sums that are kept: so many are looked into for a copy, in whatever block it lies."""
_COPIES = 1 << 8
"""Copies that are looked for at once: what is worked with stays in a core's cache, and takes no fresh memory."""
_FORM = 2
"""Of the file of sums."""


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
    strided: np.ndarray
    """R before every STRIDE-th sample and behind all, in units, int64 [ceil(N/STRIDE)+1]."""
    added: int
    """Units that bring the total up to whole copies, spread evenly over the samples."""

    @property
    def length(self) -> int:
        """Copies of an epoch."""
        return int(self.sums[-1]) // UNIT

    def copies_before(self, blocks: np.ndarray | slice, remainder: int) -> np.ndarray:
        """Copies before each of these blocks (len(bounds) - 1: behind all) in an epoch with this remainder, int64."""
        return (self.sums[blocks] + remainder) >> _BITS

    def samples_of(self, copies: np.ndarray, remainder: int) -> np.ndarray:
        """The sample that each copy of an epoch with this remainder is of, int64 [n] both."""
        rank = np.argsort(copies)
        ascending = copies[rank]  # neighbours in memory are looked at one behind the other
        # The last stretch with copies before it <= copy.
        stretches = np.searchsorted(self.strided, (ascending + 1) * UNIT - remainder, side="left") - 1
        samples = np.empty_like(copies)
        for first in range(0, len(copies), _COPIES):
            few = np.s_[first : first + _COPIES]
            here = stretches[few]
            rows, behind = self._sums_behind(here[np.diff(here, prepend=-1) > 0])
            samples[rank[few]] = rows[np.searchsorted((behind + remainder) >> _BITS, ascending[few], side="right")]
        return samples

    def _sums_behind(self, stretches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples of ascending stretches and R behind each of them, int64: both ascend."""
        samples = self.index.samples
        first = stretches * STRIDE
        sizes = np.minimum(first + STRIDE, samples) - first
        places = np.cumsum(sizes) - sizes  # of each stretch's first sample among these
        rows = np.arange(int(sizes.sum())) + np.repeat(first - places, sizes)
        offsets, labels = self._lists
        starts, ends = offsets[rows], offsets[rows + 1]
        spans = zip(starts[places].tolist(), ends[places + sizes - 1].tolist(), strict=True)
        classes = np.concatenate([labels[a:b] for a, b in spans])  # quicker than picking them by number
        lengths = ends - starts
        if self.index.way is not None:  # a mapped copy of all lists would take gigabytes in every process
            bounds, classes = mapped_lists(np.append(0, np.cumsum(lengths)), classes, self.index.way)
            lengths = np.diff(bounds)
        running = np.cumsum(_largest(self.class_factors, classes, np.cumsum(lengths) - lengths, lengths))
        # Of each stretch: R before it, less what the running sum and the added units have there.
        before = self.strided[stretches] - np.append(0, running)[places] - first * self.added // samples
        return rows, running + (rows + 1) * self.added // samples + np.repeat(before, sizes)

    @cached_property
    def _lists(self) -> tuple[np.ndarray, np.ndarray]:
        return self.index.packed_lists(0, self.index.samples)


def repeat_factors(index: Index, threshold: float, bounds: np.ndarray) -> RepeatFactors:
    """Factors of a source with t = `threshold` > 0 over blocks that begin at `bounds`, int64 [blocks+1].

    Of a large index they are summed by one process and read by all others of the user (`kept.py`).
    """
    strides = -(-index.samples // STRIDE) + 1
    summed = len(bounds) + strides

    def sound(found: np.ndarray) -> bool:
        """Whether nothing can be read from elsewhere by these, whoever wrote them."""
        if len(found) != 1 + len(index.vocabulary) + summed:
            return False
        sums, strided = np.split(found[-summed:], [len(bounds)])
        return (
            _could_be(sums, lambda some: bounds[some])
            and _could_be(strided, lambda some: _marks(index.samples, some))
            and bool(sums[-1] == strided[-1])
        )

    mapped = () if index.way is None else (index.way.labels, index.way.known)
    law = ("repeat", _FORM, UNIT, STRIDE, threshold, bounds, *mapped)
    found = kept_array(index, law, lambda: _summed(index, threshold, bounds, strides), sound)
    sums, strided = np.split(found[-summed:], [len(bounds)])
    return RepeatFactors(index, found[1:-summed], bounds, sums, strided, int(found[0]))


def _marks(samples: int, some: slice) -> np.ndarray:
    """Some of the multiples of STRIDE below N and N, int64."""
    return np.minimum(np.arange(some.start, some.stop) * STRIDE, samples)


def _could_be(sums: np.ndarray, places: Callable[[slice], np.ndarray]) -> bool:
    """Whether sums before samples at some places ascend by one a sample at least, from none to whole copies."""
    if sums[0] != 0 or sums[-1] % UNIT:
        return False
    for first in range(0, len(sums) - 1, _CHUNK):  # memory that is freed in large pieces is not always given back
        some = slice(first, min(first + _CHUNK + 1, len(sums)))
        if (np.diff(sums[some]) < np.diff(places(some)) * UNIT).any():
            return False
    return True


def _summed(index: Index, threshold: float, bounds: np.ndarray, strides: int) -> np.ndarray:
    """What is added, factors of the K classes, sums at the bounds and at the multiples of STRIDE, in a row, int64."""
    by_class = class_factors(index.class_counts(), index.samples, threshold)
    found = np.zeros(1 + len(by_class) + len(bounds) + strides, np.int64)
    found[1 : 1 + len(by_class)] = by_class
    sums, strided = np.split(found[1 + len(by_class) :], [len(bounds)])
    before = 0
    for first in range(0, index.samples, _CHUNK):
        end = min(first + _CHUNK, index.samples)
        running = before + np.cumsum(sample_factors(index, by_class, first, end))
        here = slice(*np.searchsorted(bounds, [first, end], side="right"))
        sums[here] = running[bounds[here] - first - 1]
        marks = slice(first // STRIDE + 1, -(-end // STRIDE) + 1)  # a chunk is a multiple of STRIDE
        strided[marks] = running[_marks(index.samples, marks) - first - 1]
        before = int(running[-1])
    found[0] = -before % UNIT
    for first in range(0, strides, _CHUNK):
        some = slice(first, min(first + _CHUNK, strides))
        strided[some] += _marks(index.samples, some) * found[0] // index.samples
    sums += bounds * found[0] // index.samples
    return found


def class_factors(images: np.ndarray, samples: int, threshold: float) -> np.ndarray:
    """max(1, sqrt(t / f)) of every class in units, int64 [K]; `images` [K] hold it, of `samples` in all."""
    share = np.maximum(images, 1) / samples
    return np.round(np.maximum(1.0, np.sqrt(threshold / share)) * UNIT).astype(np.int64)


def sample_factors(index: Index, by_class: np.ndarray, first: int, end: int) -> np.ndarray:
    """The largest factor of each sample's classes, UNIT where it has none, int64 [end - first]."""
    offsets, labels = index.class_lists(first, end)
    return _largest(by_class, labels, offsets[:-1], np.diff(offsets))


def _largest(by_class: np.ndarray, labels: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The largest factor of each list of labels that begins at `starts`, UNIT of an empty one, int64."""
    values = np.empty(len(labels) + 1, np.int64)
    by_class.take(labels, out=values[:-1], mode="clip")  # the rows were checked; raising would copy
    values[-1] = UNIT  # for empty lists at the end, which reduceat takes an element for
    return np.where(lengths > 0, np.maximum.reduceat(values, starts), UNIT)
