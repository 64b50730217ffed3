"""Which classes are taken for which others: exact counts of pairs, kept sparse and bounded. K classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mf_scale.distributed import comm
from mf_scale.evaluation.metrics import IntArray

SHOWN = 50
"""Pairs that are told of, the most costly first."""
MOST_PAIRS = 1 << 22
"""Different pairs above which nothing is told: a rank keeps 16 bytes for each."""
_AT_ONCE = 1 << 22
"""Pairs that are summed over the ranks at once (32 MiB)."""


class ConfusionCounts:
    """Pixels of each wrong (true class, predicted class)."""

    def __init__(self, classes: int, most: int = MOST_PAIRS) -> None:
        self.classes, self.most = classes, most
        self.pairs: IntArray = np.zeros(0, dtype=np.int64)
        """truth x K + predicted, ascending."""
        self.pixels: IntArray = np.zeros(0, dtype=np.int64)
        self.passed = False

    def update(self, predicted: NDArray[Any], truth: NDArray[Any]) -> None:
        """Add one image: classes [H,W] and true classes [H,W]; values that are no class are left out."""
        wrong = (truth != predicted) & (truth >= 0) & (predicted >= 0) & (predicted < self.classes)
        found = truth[wrong].astype(np.int64) * self.classes + predicted[wrong]
        pairs, pixels = np.unique(found, return_counts=True)
        if self.passed or not len(pairs):
            return
        merged = np.union1d(self.pairs, pairs)
        total = np.zeros(len(merged), dtype=np.int64)
        total[np.searchsorted(merged, self.pairs)] += self.pixels
        total[np.searchsorted(merged, pairs)] += pixels
        self.pairs, self.pixels = merged, total
        self.passed = len(merged) > self.most

    def results(self, truth_pixels: NDArray[np.int64], at_once: int = _AT_ONCE) -> list[dict[str, Any]] | None:
        """The most costly pairs of all ranks' images with their share of the true class's pixels; None above the bound.

        `truth_pixels`: of each class over all ranks, int64 [K]. Called by all ranks; the same for any number of them.
        """
        if comm.sum_array(np.array([self.passed], dtype=np.int64))[0]:
            return None
        kept: list[tuple[int, int]] = []
        different, rows = 0, max(1, at_once // self.classes)
        for first in range(0, self.classes, rows):
            low, high = first * self.classes, min(first + rows, self.classes) * self.classes
            here = slice(*np.searchsorted(self.pairs, [low, high]).tolist())
            dense = np.zeros(high - low, dtype=np.int64)
            dense[self.pairs[here] - low] = self.pixels[here]
            dense = comm.sum_array(dense)
            found = np.flatnonzero(dense)
            different += len(found)
            best = found[np.argsort(-dense[found], kind="stable")[:SHOWN]]
            kept = sorted([*kept, *((-int(dense[pair]), int(pair) + low) for pair in best)])[:SHOWN]
        if different > self.most:
            return None
        return [self._told(pair, -pixels, truth_pixels) for pixels, pair in kept]

    def _told(self, pair: int, pixels: int, truth_pixels: NDArray[np.int64]) -> dict[str, Any]:
        truth, predicted = divmod(pair, self.classes)
        share = pixels / int(truth_pixels[truth])
        return {"truth": truth, "predicted": predicted, "pixels": pixels, "share": share}
