"""Streaming counts of semantic and panoptic quality: int64, O(K), summed over ranks to the same number for any world.

K classes, T ground-truth segments, P predicted segments, H W image. Results are floats in [0, 1], None where a value is
undefined (no such class or segment in the ground truth).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
IOU_UNIT = 2**32
"""Sums of IoU are kept in steps of 2^-32: an integer sum has no order, so every world size gives the same result."""


class SemanticCounts:
    """Intersection, predicted and true pixels of each class."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts: IntArray = np.zeros((3, classes), dtype=np.int64)

    def update(self, predicted: NDArray[Any], truth: NDArray[Any], ignore: int = -1) -> None:
        """Add one image: classes [H,W] and true classes [H,W], of which `ignore` is left out.

        A predicted value that is no class is an error of the true class and of no other.
        """
        counted = truth != ignore
        predicted, truth = predicted[counted].astype(np.int64), truth[counted].astype(np.int64)
        named = (predicted >= 0) & (predicted < self.classes)
        self.counts[0] += np.bincount(truth[truth == predicted], minlength=self.classes)
        self.counts[1] += np.bincount(predicted[named], minlength=self.classes)
        self.counts[2] += np.bincount(truth, minlength=self.classes)

    def update_outlines(self, predicted: NDArray[Any], truth: NDArray[Any], ignore: int = -1) -> None:
        """Add the bands along the outlines of one image's classes: with them alone IoU is boundary IoU.

        Cheng et al. (CVPR 2021): intersection over union of the pixels within d of a mask's outline, inside it.
        """
        counted, near, found = truth != ignore, outlines(truth), outlines(predicted)
        named = (predicted >= 0) & (predicted < self.classes)
        same = truth == predicted
        for row, of, which in ((0, truth, near & found & same), (1, predicted, found & named), (2, truth, near)):
            self.counts[row] += np.bincount(of[which & counted].astype(np.int64), minlength=self.classes)

    def to_array(self) -> IntArray:
        """The counts [3,K]; they may be summed over ranks."""
        return self.counts

    @staticmethod
    def from_array(counts: NDArray[Any]) -> SemanticCounts:
        """Counts from (summed) `to_array` values."""
        semantic = SemanticCounts(counts.shape[1])
        semantic.counts = counts.astype(np.int64)
        return semantic

    def results(self) -> dict[str, Any]:
        """mIoU over classes present in the ground truth (the paper's evaluator), accuracies, and "per_class" IoU."""
        hit, predicted, truth = self.counts.astype(np.float64)
        present = truth > 0
        iou = hit[present] / (truth + predicted - hit)[present]
        per_class: list[float | None] = [None] * self.classes
        for label, value in zip(np.flatnonzero(present), iou, strict=True):
            per_class[label] = float(value)
        return {
            "mIoU": _mean(iou),
            "pixel_accuracy": _ratio(hit.sum(), truth.sum()),
            "mean_accuracy": _mean(hit[present] / truth[present]),
            "fwIoU": _ratio((iou * truth[present]).sum(), truth.sum()),
            "classes": int(present.sum()),
            "per_class": {"IoU": per_class, "pixels": [int(n) for n in self.counts[2]]},
        }


class PanopticCounts:
    """Matched IoU, true positives, false positives and false negatives of each class (Kirillov et al., CVPR 2019).

    With `boundary` the IoU of a pair is the smaller of mask IoU and boundary IoU (Cheng et al., CVPR 2021).
    """

    def __init__(self, classes: int, things: Sequence[bool], *, boundary: bool = False) -> None:
        self.things, self.boundary = np.asarray(things, dtype=bool), boundary
        if len(self.things) != classes:
            raise ValueError(f"{len(self.things)} thing flags for {classes} classes")
        self.counts: IntArray = np.zeros((4, classes), dtype=np.int64)

    def update(
        self,
        predicted_map: NDArray[Any],
        predicted_labels: Sequence[int] | NDArray[Any],
        truth_map: NDArray[Any],
        truth_labels: Sequence[int] | NDArray[Any],
        crowd: Sequence[bool] | NDArray[Any],
        not_exhaustive: Sequence[int] | NDArray[Any] = (),
    ) -> None:
        """Add one image: maps [H,W] of indices into the labels ([P] and [T]; crowd [T]); negative values are void.

        COCO's rules: a pair of one class with IoU > 0.5 matches, void pixels left out of the union; crowd segments
        match nothing and are no misses; a prediction that lies mostly (> 0.5) on void or on crowd of its own class is
        no false positive. Nor is one of a class of which not everything is marked (`not_exhaustive`).
        """
        predicted_labels, truth_labels = np.asarray(predicted_labels, np.int64), np.asarray(truth_labels, np.int64)
        crowd = np.asarray(crowd, dtype=bool)
        shared = _overlap(predicted_map, len(predicted_labels), truth_map, len(truth_labels))  # [P+1,T+1]
        predicted_area, truth_area = shared.sum(1)[:-1], shared.sum(0)[:-1]
        void, overlap = shared[:-1, -1], shared[:-1, :-1]
        same = predicted_labels[:, None] == truth_labels[None]  # [P,T]
        iou = _iou(shared, void)
        if self.boundary:
            iou = np.minimum(iou, _boundary_iou(predicted_map, len(predicted_labels), truth_map, len(truth_labels)))
        iou = np.where(same & ~crowd[None], iou, 0.0)
        hits = iou > 0.5  # at most one a row and a column
        excused = void + (overlap * (same & crowd[None])).sum(1)
        wrong = ~hits.any(1) & (predicted_area > 0) & ~(excused > 0.5 * predicted_area)
        wrong &= ~np.isin(predicted_labels, not_exhaustive)
        missed = ~hits.any(0) & ~crowd & (truth_area > 0)
        matched, match_of = np.nonzero(hits)
        units = np.rint(iou[matched, match_of] * IOU_UNIT).astype(np.int64)
        np.add.at(self.counts[0], predicted_labels[matched], units)
        np.add.at(self.counts[1], predicted_labels[matched], 1)
        np.add.at(self.counts[2], predicted_labels[wrong], 1)
        np.add.at(self.counts[3], truth_labels[missed], 1)

    def to_array(self) -> IntArray:
        """The counts [4,K]; they may be summed over ranks."""
        return self.counts

    @staticmethod
    def from_array(counts: NDArray[Any], things: Sequence[bool]) -> PanopticCounts:
        """Counts from (summed) `to_array` values."""
        panoptic = PanopticCounts(counts.shape[1], things)
        panoptic.counts = counts.astype(np.int64)
        return panoptic

    def results(self) -> dict[str, Any]:
        """PQ, SQ, RQ of all, things and stuff (means over classes that occur), and "per_class" values."""
        occurs = self.counts[1:].sum(0) > 0
        values = {name: np.zeros(len(occurs)) for name in ("PQ", "SQ", "RQ")}
        iou, hits, wrong, missed = self.counts.astype(np.float64)
        iou /= IOU_UNIT
        values["RQ"][occurs] = hits[occurs] / (hits + 0.5 * wrong + 0.5 * missed)[occurs]
        values["SQ"] = iou / np.maximum(hits, 1)
        values["PQ"] = values["SQ"] * values["RQ"]
        groups = {"all": occurs, "things": occurs & self.things, "stuff": occurs & ~self.things}
        summary: dict[str, Any] = {
            group: {name: _mean(value[members]) for name, value in values.items()} | {"classes": int(members.sum())}
            for group, members in groups.items()
        }
        per_class = {
            name: [float(v) if seen else None for v, seen in zip(value, occurs, strict=True)]
            for name, value in values.items()
        }
        return {**summary, "per_class": per_class}


def _overlap(predicted: NDArray[Any], predictions: int, truth: NDArray[Any], segments: int) -> IntArray:
    """Pixels shared by each predicted and each true segment [P+1,T+1]; the last row and column are void."""
    rows = np.where(predicted < 0, predictions, predicted).astype(np.int64)
    columns = np.where(truth < 0, segments, truth).astype(np.int64)
    pairs = np.bincount((rows * (segments + 1) + columns).ravel(), minlength=(predictions + 1) * (segments + 1))
    return pairs.reshape(predictions + 1, segments + 1)


def _iou(shared: IntArray, void: IntArray) -> NDArray[np.float64]:
    """IoU of each pair [P,T] from shared pixels [P+1,T+1]; `void` [P]: pixels of predictions not in the union."""
    overlap = shared[:-1, :-1]
    union = (shared.sum(1)[:-1] - void)[:, None] + shared.sum(0)[None, :-1] - overlap
    return overlap / np.maximum(union, 1)


def _boundary_iou(predicted: NDArray[Any], predictions: int, truth: NDArray[Any], segments: int) -> NDArray[np.float64]:
    """Boundary IoU of each predicted and each true segment [P,T], void pixels left out of the union."""
    found, near = outlines(predicted), outlines(truth)
    shared = _overlap(np.where(found, predicted, -1), predictions, np.where(near, truth, -1), segments)
    in_void = np.bincount(predicted[found & (predicted >= 0) & (truth < 0)], minlength=predictions)
    return _iou(shared, in_void)


def outlines(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels of a map [H,W] with another value, or the outside, within 2% of the diagonal (rounded; 1 at least).

    Along rows and columns, as erosions by 3x3 measure it: the inner band that boundary IoU takes of every mask.
    """
    reach = max(1, round(0.02 * math.hypot(*values.shape)))
    kernel = np.ones((2 * reach + 1, 2 * reach + 1), dtype=np.uint8)
    padded = np.pad(values.astype(np.float32), reach, constant_values=-1e9)
    inside = (slice(reach, -reach), slice(reach, -reach))
    return (cv2.dilate(padded, kernel) != cv2.erode(padded, kernel))[inside]


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if values.size else None


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
