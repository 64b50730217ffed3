"""mIoU and panoptic quality on cases counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mf_scale.evaluation.metrics import PanopticCounts, SemanticCounts


def test_semantic_by_hand() -> None:
    counts = SemanticCounts(4)
    truth = np.array([[0, 0, 0, 1], [1, 1, -1, -1]])
    predicted = np.array([[0, 0, 1, 1], [1, 3, 0, 2]])
    counts.update(predicted, truth)
    results = counts.results()
    # class 0: hit 2, truth 3, predicted 2 -> 2/3; class 1: hit 2, truth 3, predicted 3 -> 2/4; no 2 and 3 in the truth
    assert results["per_class"]["IoU"] == [pytest.approx(2 / 3), pytest.approx(0.5), None, None]
    assert results["mIoU"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert results["pixel_accuracy"] == pytest.approx(4 / 6)
    assert results["mean_accuracy"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert results["fwIoU"] == pytest.approx(0.5 * 2 / 3 + 0.5 * 0.5)
    assert results["classes"] == 2 and results["per_class"]["pixels"] == [3, 3, 0, 0]


def test_semantic_void_predictions_are_errors_of_the_true_class_only() -> None:
    counts = SemanticCounts(2)
    counts.update(np.array([[-1, 0]]), np.array([[0, 0]]))
    assert counts.results()["per_class"]["IoU"] == [0.5, None]


def test_semantic_counts_do_not_overflow_small_types() -> None:
    """uint8 maps of many pixels and more than 16 classes (a known error of evaluators)."""
    counts = SemanticCounts(200)
    full = np.full((600, 600), 199, dtype=np.uint8)
    counts.update(full, full, ignore=255)
    assert counts.counts[:, 199].tolist() == [360_000] * 3


def test_nothing_counted_is_undefined_not_zero() -> None:
    results = SemanticCounts(3).results()
    assert results["mIoU"] is None and results["pixel_accuracy"] is None and results["per_class"]["IoU"] == [None] * 3
    panoptic = PanopticCounts(3, [True, False, True]).results()
    assert panoptic["all"] == {"PQ": None, "SQ": None, "RQ": None, "classes": 0}


def _row(*runs: tuple[int, int]) -> np.ndarray:
    """A one-row map from (value, length) runs."""
    return np.concatenate([np.full(length, value) for value, length in runs])[None]


def _pq(
    predicted: np.ndarray, labels: list[int], truth: np.ndarray, truth_labels: list[int], crowd: list[bool]
) -> list[list[int]]:
    counts = PanopticCounts(3, [True, True, False])
    counts.update(predicted, labels, truth, truth_labels, crowd)
    return counts.counts[1:].T.tolist()  # per class: tp, fp, fn


def test_panoptic_by_hand() -> None:
    counts = PanopticCounts(3, [True, True, False])
    truth = _row((0, 10), (1, 10), (2, 20))
    predicted = _row((0, 8), (1, 12), (2, 20))
    counts.update(predicted, [0, 0, 2], truth, [0, 0, 2], [False] * 3)
    results = counts.results()
    first, second = 8 / 10, 10 / 12
    assert results["per_class"]["PQ"][0] == pytest.approx((first + second) / 2)
    assert results["per_class"]["PQ"][1:] == [None, 1.0]
    assert results["all"]["PQ"] == pytest.approx(((first + second) / 2 + 1) / 2)
    assert results["things"]["PQ"] == pytest.approx((first + second) / 2) and results["stuff"]["PQ"] == 1.0
    assert results["things"]["classes"] == 1 and results["all"]["RQ"] == 1.0


def test_an_iou_of_exactly_one_half_is_no_match() -> None:
    assert _pq(_row((0, 5), (-1, 5)), [0], _row((0, 10)), [0], [False])[0] == [0, 1, 1]
    assert _pq(_row((0, 6), (-1, 4)), [0], _row((0, 10)), [0], [False])[0] == [1, 0, 0]


def test_the_class_must_agree() -> None:
    assert _pq(_row((0, 10)), [1], _row((0, 10)), [0], [False]) == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_void_leaves_the_union_and_excuses_a_prediction() -> None:
    # 6 of 12 predicted pixels on void: union is 6 + 10 - 6 = 10, so 6/10 matches (12 + 10 - 6 = 16 would not).
    counts = PanopticCounts(1, [True])
    counts.update(_row((-1, 4), (0, 12)), [0], _row((0, 10), (-1, 6)), [0], [False])
    assert counts.counts[1:, 0].tolist() == [1, 0, 0]
    assert counts.results()["all"]["SQ"] == pytest.approx(0.6)
    # mostly on void: no false positive; exactly half on void: one.
    assert _pq(_row((0, 11), (-1, 5)), [0], _row((-2, 6), (0, 10)), [1], [False])[0] == [0, 0, 0]
    assert _pq(_row((0, 12), (-1, 4)), [0], _row((-1, 6), (0, 10)), [1], [False])[0] == [0, 1, 0]


def test_crowd_matches_nothing_is_no_miss_and_excuses_its_own_class() -> None:
    truth = _row((0, 10), (1, 10))
    for label, wrong in ((0, 0), (1, 1)):
        per_class = _pq(_row((0, 10), (-1, 10)), [label], truth, [0, 2], [True, False])
        assert per_class[0][2] == 0, "a crowd segment is never missed"
        assert per_class[label][:2] == [0, wrong]
    assert _pq(_row((0, 3), (1, 4), (-1, 13)), [0, 0], _row((-1, 2), (0, 18)), [0], [True])[0] == [0, 0, 0]


def test_empty_segments_count_nothing() -> None:
    empty = np.full((2, 3), -1)
    assert _pq(empty, [0], empty, [1], [False]) == [[0, 0, 0]] * 3


def test_no_prediction_and_no_truth_at_all() -> None:
    empty = np.full((2, 3), -1)
    assert _pq(empty, [], empty, [], []) == [[0, 0, 0]] * 3
    assert _pq(empty, [], np.zeros((2, 3), int), [2], [False])[2] == [0, 0, 1]


def test_sums_over_ranks_are_the_same_for_any_split() -> None:
    generator = np.random.default_rng(0)
    images = [
        (
            generator.integers(-1, 4, (9, 9)),
            generator.integers(0, 3, 4),
            generator.integers(-2, 5, (9, 9)),
            generator.integers(0, 3, 5),
        )
        for _ in range(12)
    ]
    totals = []
    for world in (1, 2, 5):
        ranks = [PanopticCounts(3, [True, True, False]) for _ in range(world)]
        for i, (predicted, labels, truth, truth_labels) in enumerate(images):
            ranks[i % world].update(predicted, labels, truth, truth_labels, [False] * 5)
        summed = np.sum([rank.to_array() for rank in ranks], axis=0)
        totals.append(PanopticCounts.from_array(summed, [True, True, False]).results())
    assert totals[0] == totals[1] == totals[2]


def test_a_thing_flag_for_every_class() -> None:
    with pytest.raises(ValueError, match="2 thing flags for 3 classes"):
        PanopticCounts(3, [True, False])
