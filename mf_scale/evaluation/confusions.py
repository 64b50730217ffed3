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
_WAITING = 1 << 18
"""Pairs of images that wait, at least, until they are merged (4 MiB): a merge sorts all that there are."""
_AT_ONCE = 1 << 21
"""Pairs of all ranks that one of them merges at once (32 MiB)."""


class ConfusionCounts:
    """Pixels of each wrong (true class, predicted class)."""

    def __init__(self, classes: int, most: int = MOST_PAIRS) -> None:
        self.classes, self.most = classes, most
        self.pairs: IntArray = np.zeros(0, dtype=np.int64)
        """truth x K + predicted, ascending."""
        self.pixels: IntArray = np.zeros(0, dtype=np.int64)
        self.passed = False
        self._waiting: list[tuple[IntArray, IntArray]] = []
        """Pairs and pixels of images that are not merged yet."""
        self._waiting_pairs = 0

    def update(self, predicted: NDArray[Any], truth: NDArray[Any]) -> None:
        """Add one image: classes [H,W] and true classes [H,W]; values that are no class are left out."""
        if self.passed:
            return
        wrong = (truth != predicted) & (truth >= 0) & (predicted >= 0) & (predicted < self.classes)
        found = truth[wrong].astype(np.int64) * self.classes + predicted[wrong]
        self._waiting.append(np.unique(found, return_counts=True))
        self._waiting_pairs += len(self._waiting[-1][0])
        if self._waiting_pairs > max(_WAITING, len(self.pairs)):
            self._merge()

    def results(self, truth_pixels: NDArray[np.int64], at_once: int = _AT_ONCE) -> list[dict[str, Any]] | None:
        """The most costly pairs of all ranks' images with their share of the true class's pixels; None above the bound.

        `truth_pixels`: of each class over all ranks, int64 [K]. Called by all ranks; the same for any number of them.
        The pairs of all ranks are merged a part at a time, by one rank after the other.
        """
        self._merge()
        passed, total = comm.sum_array(np.array([self.passed, len(self.pairs)], dtype=np.int64)).tolist()
        if passed:
            return None
        rank, world = comm.place()
        parts = -(-total // at_once)
        different, kept = 0, list[tuple[int, int]]()
        for part in range(parts):
            here = self.pairs % parts == part
            gathered = comm.gather_bytes(np.stack([self.pairs[here], self.pixels[here]]).tobytes(), part % world)
            if part % world == rank:
                read = [np.frombuffer(data, dtype=np.int64).reshape(2, -1) for data in gathered]
                pairs, pixels = _merged([values[0] for values in read], [values[1] for values in read])
                different += len(pairs)
                best = np.argsort(-pixels, kind="stable")[:SHOWN]
                found = zip((-pixels[best]).tolist(), pairs[best].tolist(), strict=True)
                kept = sorted([*kept, *found])[:SHOWN]
        if comm.sum_array(np.array([different], dtype=np.int64))[0] > self.most:
            return None
        told = comm.gather_objects(kept) or []
        first = comm.broadcast_object(sorted((*pair,) for of_rank in told for pair in of_rank)[:SHOWN])
        return [self._told(pair, -pixels, truth_pixels) for pixels, pair in first]

    def _merge(self) -> None:
        pairs, pixels = zip((self.pairs, self.pixels), *self._waiting, strict=True)
        self.pairs, self.pixels = _merged(pairs, pixels)
        self._waiting, self._waiting_pairs = [], 0
        self.passed = self.passed or len(self.pairs) > self.most
        if self.passed:
            self.pairs, self.pixels = self.pairs[:0].copy(), self.pixels[:0].copy()

    def _told(self, pair: int, pixels: int, truth_pixels: NDArray[np.int64]) -> dict[str, Any]:
        truth, predicted = divmod(pair, self.classes)
        share = pixels / int(truth_pixels[truth])
        return {"truth": truth, "predicted": predicted, "pixels": pixels, "share": share}


def _merged(pairs: Any, pixels: Any) -> tuple[IntArray, IntArray]:
    """The different ones of several lists of pairs, ascending, with the sums of their pixels."""
    all_pairs, all_pixels = np.concatenate(pairs), np.concatenate(pixels)
    order = np.argsort(all_pairs, kind="stable")
    different, first = np.unique(all_pairs[order], return_index=True)
    return different, np.add.reduceat(all_pixels[order], first) if len(different) else all_pixels
