"""The three inferences against a plain statement of their rules, and against transformers' where the rules agree."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mf_scale.bench.memory import peak_over_inputs
from mf_scale.evaluation.inference import Instances, instance, panoptic, semantic
from mf_scale.models.outputs import MaskPrediction
from tests.random_batches import said_outright

HIGH = 12.0


def _random(
    seed: int, images: int = 2, queries: int = 7, classes: int = 5, grid: tuple[int, int] = (6, 9)
) -> MaskPrediction:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return said_outright(
        3 * normal(images, queries, classes + 1), normal(images, queries, 4), 2 * normal(images, 4, *grid)
    )


def _from_masks(class_logits: list[list[float]], mask_logits: Tensor) -> MaskPrediction:
    """A prediction whose mask logits are exactly `mask_logits` [Q,h,w]."""
    return said_outright(
        torch.tensor([class_logits]), torch.eye(len(mask_logits))[None], mask_logits[None].to(torch.float32)
    )


def _mask_logits(prediction: MaskPrediction, size: tuple[int, int]) -> Tensor:
    logits = torch.einsum("bqc,bchw->bqhw", prediction.mask_embeddings, prediction.pixel_embeddings)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _dense_semantic(prediction: MaskPrediction, size: tuple[int, int]) -> Tensor:
    probabilities = prediction.class_logits.softmax(-1)[..., :-1]
    scores = torch.einsum("bqk,bqhw->bkhw", probabilities, _mask_logits(prediction, size).sigmoid())
    return scores.argmax(1)


@pytest.mark.parametrize("size", [(6, 9), (23, 40), (4, 5), (1, 1)])
@pytest.mark.parametrize("budget", [1, 400, 3000, 1 << 20])
def test_semantic_is_the_dense_formula_for_any_budget(size: tuple[int, int], budget: int) -> None:
    prediction = _random(0)
    assert torch.equal(semantic(prediction, size, budget=budget), _dense_semantic(prediction, size))


def test_semantic_sums_over_queries_before_the_argmax() -> None:
    """Two queries of 0.4 for class 1 outvote one of 0.6 for class 0."""
    probabilities = torch.tensor([[0.6, 0.1, 0.3], [0.1, 0.4, 0.5], [0.1, 0.4, 0.5]])
    prediction = _from_masks(probabilities.log().tolist(), torch.full((3, 2, 2), HIGH))
    assert (semantic(prediction, (4, 4)) == 1).all()


def test_semantic_upsamples_logits_not_decisions() -> None:
    """The border of two masks lies where the interpolated logits cross, not at a cell's edge."""
    mask = torch.tensor([[[9.0, -3.0]], [[-9.0, 3.0]]])
    result = semantic(_from_masks([[9.0, 0, 0], [0, 9.0, 0]], mask), (1, 16))
    assert result.flatten().tolist() == [0] * 10 + [1] * 6


def test_extent_leaves_the_padding_out() -> None:
    """An image that fills 3 of 4 columns of the grid: the fourth column must not be seen."""
    mask = torch.tensor([[[HIGH, HIGH, HIGH, -HIGH]], [[-HIGH, -HIGH, -HIGH, HIGH]]])
    prediction = _from_masks([[9.0, 0, 0], [0, 9.0, 0]], mask)
    assert (semantic(prediction, (1, 12)) == 1).sum() == 3
    assert (semantic(prediction, (1, 12), extent=(1.0, 3.0)) == 1).sum() == 0
    (segment_map, _), *_ = panoptic(prediction, (1, 12), [True, True], 0.5, 0.5, extent=(1.0, 3.0))
    assert (segment_map == 0).all()


def test_a_large_vocabulary_at_a_large_size_stays_in_its_budget() -> None:
    """1000 classes at 1024 x 256 pixels: K x H x W would be 1 GiB."""
    prediction = _random(1, images=1, queries=3, classes=1000, grid=(256, 64))
    peak = peak_over_inputs(lambda: semantic(prediction, (1024, 256), budget=1 << 20), torch.device("cpu"))
    assert 0 < peak < 16


def _paper_panoptic(
    prediction: MaskPrediction,
    size: tuple[int, int],
    things: list[bool],
    object_threshold: float,
    overlap_threshold: float,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The rules one query after the other, dense, for the first image."""
    scores, labels = prediction.class_logits[0].softmax(-1).max(-1)
    keep = (labels < len(things)) & (scores > object_threshold)
    masks = _mask_logits(prediction, size)[0].sigmoid()[keep]
    scores, labels = scores[keep], labels[keep]
    result = np.full(size, -1)
    segments: list[dict[str, Any]] = []
    seen: dict[int, int] = {}
    if not len(masks):
        return result, []
    owner = (scores[:, None, None] * masks).argmax(0)
    for k, label in enumerate(labels.tolist()):
        mine, mask = owner == k, masks[k] >= 0.5
        if not mine.any() or not mask.any() or mine.sum() / mask.sum() < overlap_threshold:
            continue
        if not things[label] and label in seen:
            result[mine] = seen[label]
            continue
        seen[label] = len(segments)
        result[mine] = len(segments)
        segments.append({"label": label, "thing": things[label]})
    return result, segments


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [1, 1500, 1 << 20])
def test_panoptic_is_the_papers_rules_for_any_budget(seed: int, budget: int) -> None:
    prediction, things = _random(seed, queries=12), [True, False, True, False, False]
    expected, expected_segments = _paper_panoptic(prediction, (25, 31), things, 0.4, 0.3)
    segment_map, segments = panoptic(prediction, (25, 31), things, 0.4, 0.3, budget=budget)[0]
    assert segment_map.dtype == torch.int32
    assert np.array_equal(segment_map.numpy(), expected)
    assert [{k: s[k] for k in ("label", "thing")} for s in segments] == expected_segments


def _halves(left: float, right: float) -> list[list[float]]:
    return [[left, left, right, right]] * 2


def test_stuff_of_one_class_is_merged_and_things_are_not() -> None:
    masks = torch.tensor([_halves(HIGH, -HIGH), _halves(-HIGH, HIGH)])
    for thing, count in ((False, 1), (True, 2)):
        prediction = _from_masks([[9.0, 0.0], [8.0, 0.0]], masks)
        segment_map, segments = panoptic(prediction, (4, 8), [thing], 0.5, 0.5)[0]
        assert len(segments) == count
        assert set(segment_map.unique().tolist()) == set(range(count))
        assert max(s["score"] for s in segments) == pytest.approx(torch.tensor([9.0, 0.0]).softmax(0)[0].item())


def test_the_object_threshold_acts() -> None:
    masks = torch.tensor([_halves(HIGH, -HIGH), _halves(-HIGH, HIGH)])
    prediction = _from_masks([[0.7, 0.3], [0.6, 0.4]], masks)
    prediction.class_embeddings = torch.tensor([[[0.7, 0.3], [0.6, 0.4]]]).log()
    counts = [len(panoptic(prediction, (2, 4), [True], t, 0.0)[0][1]) for t in (0.55, 0.65, 0.75)]
    assert counts == [2, 1, 0]


def test_the_overlap_threshold_acts() -> None:
    """The weaker query's mask covers all of it; the stronger one leaves it half."""
    masks = torch.tensor([_halves(HIGH, -HIGH), _halves(HIGH, HIGH)])
    prediction = _from_masks([[9.0, 0.0, 0.0], [0.0, 2.0, 0.0]], masks)
    assert [s["label"] for s in panoptic(prediction, (2, 4), [True, True], 0.5, 0.4)[0][1]] == [0, 1]
    segment_map, segments = panoptic(prediction, (2, 4), [True, True], 0.5, 0.6)[0]
    assert [s["label"] for s in segments] == [0]
    assert (segment_map[:, 2:] == -1).all() and (segment_map[:, :2] == 0).all()


def test_no_object_and_no_kept_query_give_void() -> None:
    prediction = _from_masks([[0.0, 9.0], [0.0, 9.0]], torch.full((2, 2, 2), HIGH))
    segment_map, segments = panoptic(prediction, (3, 5), [True], 0.0, 0.0)[0]
    assert segments == [] and segment_map.shape == (3, 5) and (segment_map == -1).all()


def test_half_precision_predictions_are_taken_in_fp32() -> None:
    prediction = _random(3)
    half = _cast(prediction, torch.bfloat16)
    assert torch.equal(semantic(half, (20, 20)), _dense_semantic(_cast(half, torch.float32), (20, 20)))


def _cast(prediction: MaskPrediction, dtype: torch.dtype) -> MaskPrediction:
    return said_outright(
        prediction.class_logits.to(dtype), prediction.mask_embeddings.to(dtype), prediction.pixel_embeddings.to(dtype)
    )


@pytest.mark.parametrize("mask_threshold", [0.2, 0.5, 0.8])
def test_the_mask_threshold_of_panoptic_says_what_a_querys_own_mask_is(mask_threshold: float) -> None:
    """A query of probability 0.3 on the half it loses and 0.9 on the half it keeps."""
    weak = torch.tensor([0.3, 0.9]).logit().tolist()
    masks = torch.tensor([_halves(HIGH, -HIGH), [[weak[0], weak[0], weak[1], weak[1]]] * 2])
    prediction = _from_masks([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]], masks)
    _, segments = panoptic(prediction, (2, 4), [True, True], 0.5, 0.8, mask_threshold=mask_threshold)[0]
    assert [s["label"] for s in segments] == ([0] if mask_threshold < 0.3 else [0, 1])


def _dense_instances(
    prediction: MaskPrediction,
    size: tuple[int, int],
    things: list[bool],
    top_k: int,
    score_threshold: float,
    mask_threshold: float = 0.5,
) -> list[tuple[int, float, Tensor]]:
    """The rule one pair after the other, dense, for the first image: (class, score, mask), best first."""
    probabilities = prediction.class_logits[0].softmax(-1)
    masks = _mask_logits(prediction, size)[0].sigmoid()
    pairs = [(float(probabilities[q, k]), q, k) for q in range(len(masks)) for k in range(len(things)) if things[k]]
    found = []
    for probability, q, k in sorted(pairs, key=lambda pair: -pair[0])[:top_k]:
        inside = masks[q] >= mask_threshold
        if inside.any():
            found.append((k, probability * float(masks[q][inside].mean()), inside))
    return sorted((f for f in found if f[1] >= score_threshold), key=lambda f: -f[1])


def _listed(found: Instances) -> list[tuple[int, float, Tensor]]:
    masks = (torch.from_numpy(found.mask(i)) for i in range(len(found)))
    return list(zip(found.labels.tolist(), found.scores.tolist(), masks, strict=True))


def _same(found: list[tuple[int, float, Tensor]], expected: list[tuple[int, float, Tensor]]) -> None:
    assert [f[0] for f in found] == [e[0] for e in expected]
    assert [f[1] for f in found] == pytest.approx([e[1] for e in expected], rel=1e-5)
    assert all(torch.equal(f[2], e[2]) for f, e in zip(found, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 9),
    things=st.lists(st.booleans(), min_size=1, max_size=6),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    size=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    budget=st.sampled_from([1, 500, 4000, 1 << 20]),
    top_k=st.integers(1, 30),
    score_threshold=st.sampled_from([0.0, 0.1, 0.4]),
    mask_threshold=st.sampled_from([0.0, 0.3, 0.5, 0.7]),
)
def test_instances_are_the_dense_rule_for_any_shape_and_budget(
    seed: int,
    queries: int,
    things: list[bool],
    grid: tuple[int, int],
    size: tuple[int, int],
    budget: int,
    top_k: int,
    score_threshold: float,
    mask_threshold: float,
) -> None:
    prediction = _random(seed, queries=queries, classes=len(things), grid=grid)
    found, second = instance(
        prediction, size, things, top_k, score_threshold, mask_threshold=mask_threshold, budget=budget
    )
    assert found.size == second.size == size and found.masks.dtype == torch.uint8
    assert found.masks.shape[1:] == (size[0], math.ceil(size[1] / 8)) and len(found.masks) <= queries
    _same(_listed(found), _dense_instances(prediction, size, things, top_k, score_threshold, mask_threshold))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 9),
    classes=st.integers(1, 9),
    size=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    budget=st.integers(1, 5000),
)
def test_semantic_and_panoptic_do_not_depend_on_the_budget(
    seed: int, queries: int, classes: int, size: tuple[int, int], budget: int
) -> None:
    prediction, things = _random(seed, queries=queries, classes=classes), [k % 2 == 0 for k in range(classes)]
    assert torch.equal(semantic(prediction, size, budget=budget), semantic(prediction, size))
    for (one, listed), (other, also) in zip(
        panoptic(prediction, size, things, 0.3, 0.4, budget=budget),
        panoptic(prediction, size, things, 0.3, 0.4),
        strict=True,
    ):
        assert torch.equal(one, other) and listed == also


def test_a_query_of_two_classes_is_two_instances_of_one_mask() -> None:
    prediction = _from_masks([[2.0, 2.0, 9.0, 0.0]], torch.full((1, 2, 2), HIGH))
    (found,) = instance(prediction, (4, 4), [True, True, False], 100, 0.0)
    assert found.labels.tolist() == [0, 1] and len(found.masks) == 1 and found.mask(1).all()


def test_stuff_takes_no_things_place_and_empty_masks_are_dropped() -> None:
    masks = torch.tensor([_halves(HIGH, HIGH), _halves(-HIGH, -HIGH), _halves(HIGH, -HIGH)])
    prediction = _from_masks([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 8.0, 0, 0]], masks)
    (found,) = instance(prediction, (2, 4), [False, True, True], 2, 0.0)
    assert found.labels.tolist() == [1] and found.mask(0).tolist() == [[True, True, False, False]] * 2
    for things in ([False] * 3, [True] * 3):
        assert len(instance(prediction, (2, 4), things, 5, 1.0)[0]) == 0


def test_the_thresholds_of_instances_act() -> None:
    prediction = _random(5, images=1, queries=20)
    counts = [len(instance(prediction, (9, 9), [True] * 5, 50, t)[0]) for t in (0.0, 0.2, 0.5)]
    assert counts[0] > counts[1] > counts[2] > 0
    best = [instance(prediction, (9, 9), [True] * 5, 1, 0.0, mask_threshold=t)[0].mask(0) for t in (0.2, 0.5, 0.8)]
    areas = [int(mask.sum()) for mask in best]
    assert areas[0] > areas[1] > areas[2] > 0
    assert len(instance(prediction, (9, 9), [True] * 5, 3, 0.0)[0]) == 3


def test_many_instances_at_a_large_size_stay_in_their_budget() -> None:
    """100 queries at 1024 x 1024 pixels: 400 MiB as fp32, 100 MiB as bool, 12.5 MiB as they are kept."""
    prediction = _random(2, images=1, queries=100, classes=3, grid=(64, 64))
    kept = []
    work = lambda: kept.extend(instance(prediction, (1024, 1024), [True] * 3, 100, 0.0, budget=1 << 20))  # noqa: E731
    assert 0 < peak_over_inputs(work, torch.device("cpu")) < 60
    (found,) = kept
    assert len(found) == 100 and found.masks.nbytes <= 100 * 1024 * 1024 // 8


def _outputs(prediction: MaskPrediction) -> SimpleNamespace:
    logits = torch.einsum("bqc,bchw->bqhw", prediction.mask_embeddings, prediction.pixel_embeddings)
    return SimpleNamespace(class_queries_logits=prediction.class_logits, masks_queries_logits=logits)


@pytest.fixture(scope="module")
def processor() -> Any:
    return pytest.importorskip("transformers").MaskFormerImageProcessor()


class TestAgainstTransformers:
    """The same logits through transformers' post-processing, at the size of the logits.

    At other sizes it goes its own way: it resizes class scores (semantic), probabilities (panoptic) or finished masks
    by the nearest pixel (instance) where the papers' code and ours resize mask logits.
    """

    @pytest.mark.parametrize("seed", range(3))
    def test_semantic(self, processor: Any, seed: int) -> None:
        prediction = _random(seed, queries=9)
        theirs = processor.post_process_semantic_segmentation(_outputs(prediction))
        assert torch.equal(semantic(prediction, (6, 9)), torch.stack(theirs))

    @pytest.mark.parametrize("seed", range(3))
    def test_panoptic(self, processor: Any, seed: int) -> None:
        """Masks are clear-cut here and nothing is fused.

        It cuts a query's own mask after multiplying it with the class probability, asks for more than the overlap
        threshold instead of as much, and counts its ids on from a fused segment's, so that two segments may share one.
        """
        prediction = _random(seed, queries=12)
        prediction.class_embeddings *= 3
        prediction.pixel_embeddings *= 30
        theirs = processor.post_process_panoptic_segmentation(
            _outputs(prediction), threshold=0.6, overlap_mask_area_threshold=0.3, label_ids_to_fuse=set()
        )
        found = 0
        for (segment_map, segments), other in zip(
            panoptic(prediction, (6, 9), [True] * 5, 0.6, 0.3), theirs, strict=True
        ):
            assert torch.equal(segment_map + 1, other["segmentation"])
            assert [s["label"] for s in segments] == [s["label_id"] for s in other["segments_info"]]
            assert [s["score"] for s in segments] == pytest.approx(
                [s["score"] for s in other["segments_info"]], abs=1e-6
            )
            found += len(segments)
        assert found > 2

    @pytest.mark.parametrize("threshold", [0.0, 0.3])
    def test_instance(self, processor: Any, threshold: float) -> None:
        """All classes are things here and as many pairs are taken as there are queries: it knows no other number.

        It takes no notice of its mask threshold (always 0.5).
        """
        prediction = _random(7, queries=12)
        theirs = processor.post_process_instance_segmentation(
            _outputs(prediction), threshold=threshold, return_binary_maps=True
        )
        for found, other in zip(instance(prediction, (6, 9), [True] * 5, 12, threshold), theirs, strict=True):
            listed = zip(other["segments_info"], other["segmentation"], strict=True)
            expected = sorted(((s["label_id"], s["score"], mask.bool()) for s, mask in listed), key=lambda e: -e[1])
            assert expected
            _same(_listed(found), expected)
