"""Semantic and panoptic inference against a plain statement of the paper's rules."""

from __future__ import annotations

import resource
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mf_scale.evaluation.inference import panoptic, semantic
from mf_scale.models.outputs import MaskPrediction

HIGH = 12.0


def _random(
    seed: int, images: int = 2, queries: int = 7, classes: int = 5, grid: tuple[int, int] = (6, 9)
) -> MaskPrediction:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return MaskPrediction(
        3 * normal(images, queries, classes + 1), normal(images, queries, 4), 2 * normal(images, 4, *grid)
    )


def _from_masks(class_logits: list[list[float]], mask_logits: Tensor) -> MaskPrediction:
    """A prediction whose mask logits are exactly `mask_logits` [Q,h,w]."""
    return MaskPrediction(
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    semantic(prediction, (1024, 256), budget=1 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


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
    prediction.class_logits = torch.tensor([[[0.7, 0.3], [0.6, 0.4]]]).log()
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
    return MaskPrediction(
        prediction.class_logits.to(dtype), prediction.mask_embeddings.to(dtype), prediction.pixel_embeddings.to(dtype)
    )
