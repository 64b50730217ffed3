"""Panoptic and semantic counts against slow independent statements."""

from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from mf_scale.evaluation.metrics import IOU_UNIT, PanopticCounts, SemanticCounts

CLASSES, PREDICTIONS, SEGMENTS, SIZE = 3, 4, 4, (5, 6)
maps = arrays(np.int32, SIZE, elements=st.integers(-2, 3))
labels = arrays(np.int64, 4, elements=st.integers(0, CLASSES - 1))
flags = arrays(bool, 4)


def _slow(predicted, predicted_labels, truth, truth_labels, crowd):
    """The definition, with sets of pixels: (IoU sum, tp, fp, fn) of each class."""
    pixels = [(y, x) for y in range(SIZE[0]) for x in range(SIZE[1])]
    void = {p for p in pixels if truth[p] < 0}
    found = {i: {p for p in pixels if predicted[p] == i} for i in range(PREDICTIONS)}
    real = {j: {p for p in pixels if truth[p] == j} for j in range(SEGMENTS)}
    totals = [[Fraction(0), 0, 0, 0] for _ in range(CLASSES)]
    matched_found, matched_real = set(), set()
    for i, mask in found.items():
        for j, target in real.items():
            union = (mask | target) - (mask & void)
            if crowd[j] or predicted_labels[i] != truth_labels[j] or not union:
                continue
            iou = Fraction(len(mask & target), len(union))
            if iou > Fraction(1, 2):
                assert i not in matched_found and j not in matched_real
                matched_found.add(i)
                matched_real.add(j)
                totals[predicted_labels[i]][0] += iou
                totals[predicted_labels[i]][1] += 1
    for i, mask in found.items():
        excuse = void.union(*(real[j] for j in real if crowd[j] and truth_labels[j] == predicted_labels[i]))
        if mask and i not in matched_found and not 2 * len(mask & excuse) > len(mask):
            totals[predicted_labels[i]][2] += 1
    for j, target in real.items():
        if target and j not in matched_real and not crowd[j]:
            totals[truth_labels[j]][3] += 1
    return totals


@settings(max_examples=150, deadline=None)
@given(maps, labels, maps, labels, flags)
def test_panoptic_counts_are_the_definition(predicted, predicted_labels, truth, truth_labels, crowd) -> None:
    counts = PanopticCounts(CLASSES, [True, False, True])
    counts.update(predicted, predicted_labels, truth, truth_labels, crowd)
    for label, (iou, *others) in enumerate(_slow(predicted, predicted_labels, truth, truth_labels, crowd)):
        assert counts.counts[1:, label].tolist() == others
        assert abs(counts.counts[0, label] / IOU_UNIT - float(iou)) < 1e-8


@settings(max_examples=60, deadline=None)
@given(labels, flags, maps)
def test_the_truth_as_prediction_is_perfect(truth_labels, crowd, truth) -> None:
    counts = PanopticCounts(CLASSES, [True, False, True])
    counts.update(truth, truth_labels, truth, truth_labels, crowd)
    assert counts.results()["all"]["PQ"] in (1.0, None)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(maps, maps), min_size=1, max_size=3))
def test_semantic_counts_are_the_confusion_matrix(images) -> None:
    counts = SemanticCounts(4)
    matrix = np.zeros((4, 5), dtype=np.int64)
    for predicted, raw_truth in images:
        truth = np.maximum(raw_truth, -1)
        counts.update(predicted, truth)
        for p, t in zip(predicted.ravel(), truth.ravel(), strict=True):
            if t >= 0:
                matrix[t, p if p >= 0 else 4] += 1
    hit, true, found = np.diag(matrix), matrix.sum(1), matrix.sum(0)[:4]
    expected = [hit[k] / (true[k] + found[k] - hit[k]) if true[k] else None for k in range(4)]
    results = counts.results()
    assert results["per_class"]["IoU"] == expected
    seen = [v for v in expected if v is not None]
    assert (results["mIoU"] is None) == (not seen)
    if seen:
        assert abs(results["mIoU"] - sum(seen) / len(seen)) < 1e-12
