"""PQ of a federated image: what nobody looked for is left out, what is not marked throughout has no false positives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mf_scale.config.load import load_config
from mf_scale.data.decode import Federated
from mf_scale.data.loader import EvalSample
from mf_scale.evaluation.counting import Counts
from mf_scale.evaluation.metrics import PanopticCounts
from mf_scale.vocabulary import ClassInfo, Vocabulary

VOCABULARY = Vocabulary("v", tuple(ClassInfo(f"c{i}", True, i) for i in range(5)))
SIZE = (20, 24)


def sample_of(labels: list[int], federated: Federated | None) -> EvalSample:
    """Segment i, of class labels[i], in columns 4i to 4i + 4 of the upper half; the last one in all of the lower."""
    segment_map = np.full((1, *SIZE), -1, np.int16)
    for i in range(len(labels)):
        segment_map[0, : SIZE[0] // 2, 4 * i : 4 * i + 4] = i
    segment_map[0, SIZE[0] // 2 :] = len(labels) - 1
    count = len(labels)
    return EvalSample(
        "k", np.zeros((*SIZE, 3), np.uint8), segment_map, np.array(labels, np.int64), np.zeros(count, np.int64),
        np.zeros(count, bool), 1, federated,
    )  # fmt: skip


def counted(sample: EvalSample, said: list[tuple[int, tuple[slice, slice]]]) -> tuple[list[Any], float | None]:
    """[matched, wrong, missed] of each class, by mask IoU and by boundary IoU, and the image's own score."""
    found = np.full(SIZE, -1, np.int32)
    for i, (_, where) in enumerate(said):
        found[where] = i
    segments = [{"label": label} for label, _ in said]
    answer: Any = SimpleNamespace(panoptic=lambda things, config: (found, segments))
    things = VOCABULARY.things
    counts = Counts(
        VOCABULARY,
        load_config(None, ["data.task=instance"]),
        panoptic=PanopticCounts(len(things), things),
        outlined=PanopticCounts(len(things), things, boundary=True),
    )
    score = counts.add(0, sample, answer, scored=True)
    assert counts.panoptic is not None and counts.outlined is not None
    by_mask, by_boundary = counts.panoptic.counts[1:], counts.outlined.counts[1:]
    assert (by_mask == by_boundary).all()
    return by_mask.T.tolist(), score


def box(column: int, *, below: bool = False) -> tuple[slice, slice]:
    return slice(10, 20) if below else slice(0, 10), slice(4 * column, 4 * column + 4)


SAID = [(0, box(0)), (0, box(1, below=True)), (1, box(1)), (1, box(2, below=True))]
SAID += [(2, box(3, below=True)), (3, box(4, below=True))]
"""Found and once too much: class 0 and 1; too much: 2 and 3. (Of 4 nothing is said.)"""


@pytest.mark.parametrize(
    ("federated", "wrong"),
    [
        (None, [1, 1, 1, 1, 0]),
        (([2], []), [1, 1, 1, 0, 0]),
        (([2, 3], []), [1, 1, 1, 1, 0]),
        (([2], [1]), [1, 0, 1, 0, 0]),
        (([], [0, 1]), [0, 0, 0, 0, 0]),
        (([], [3]), [1, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_only_what_was_looked_for_can_be_wrong(federated: tuple[list[int], list[int]] | None, wrong: list[int]) -> None:
    lists = None if federated is None else Federated(*(np.array(k, np.int64) for k in federated))
    by_class, score = counted(sample_of([0, 1, 4], lists), SAID)
    hits, missed = [1, 1, 0, 0, 0], [0, 0, 0, 0, 1]
    assert by_class == [list(row) for row in zip(hits, wrong, missed, strict=True)]
    own = [h / (h + w / 2 + m / 2) for h, w, m in by_class if h + w + m]
    assert score == pytest.approx(np.mean(own))


def test_a_segment_that_is_left_out_takes_no_part_in_another_s() -> None:
    """It lies in the middle of a true segment: what is missed of that one, and found of it, is as if it were void."""
    nobody = Federated(np.array([], np.int64), np.array([], np.int64))
    inside = (slice(0, 3), slice(0, 4))
    with_it, score = counted(sample_of([0, 4], nobody), [(0, box(0)), (3, inside)])
    assert with_it[0] == [1, 0, 0] and with_it[3] == [0, 0, 0]
    assert (with_it, score) == counted(sample_of([0, 4], nobody), [(0, (slice(3, 10), slice(0, 4)))])


def test_an_image_s_own_score_excuses_the_same_classes() -> None:
    """Of classes that are not the first ones."""
    partly = Federated(np.array([], np.int64), np.array([3], np.int64))
    said = [(3, box(0)), (3, box(1, below=True))]
    assert counted(sample_of([3, 4], partly), said)[1] == counted(sample_of([3, 4], None), said[:1])[1]
