"""The most probable class: as one argmax of all scores says, ties too, and without what cannot win."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mf_scale.evaluation import class_maximum
from mf_scale.evaluation.class_maximum import chunks, most_probable_class


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 6),
    classes=st.integers(1, 20),
    at_once=st.integers(1, 8),
    scores=st.integers(1, 60),
    empty=st.sampled_from([0.0, 0.5, 1.0]),
    sure=st.booleans(),
    hide=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_it_is_the_argmax_of_all_scores_with_ties_for_the_lowest_class(
    seed: int, queries: int, classes: int, at_once: int, scores: int, empty: float, sure: bool, hide: float
) -> None:
    """Weights and masks are sixteenths, so that every sum is exact and many are equal.

    Hidden classes have no weight, and do not win where all scores are 0 either; if all are hidden, none is.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, 4, (queries, classes), generator=generator) / 16
    if sure:
        weights[torch.arange(queries), torch.randint(0, classes, (queries,), generator=generator)] = 15 / 16
    masks = torch.randint(0, 17, (queries, 3, 5), generator=generator) / 16
    masks[:, torch.rand(3, 5, generator=generator) < empty] = 0
    hidden = torch.rand(classes, generator=generator) < hide
    weights[:, hidden] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_maximum, "CLASSES_AT_ONCE", at_once)
        patch.setitem(class_maximum._SCORES_AT_ONCE, "cpu", scores)
        found = most_probable_class(chunks(weights, hidden if hide else None), masks)
    scores_of_all = torch.einsum("qk,qhw->khw", weights, masks)
    if not hidden.all():
        scores_of_all[hidden] = -1
    assert torch.equal(found, scores_of_all.argmax(0))


def _flops(sure: float) -> float:
    """Of 30 queries on 5000 classes at 20 x 20 pixels, as a share of those of all scores."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 5000, generator=generator) * (1 if sure else 0.01)
    logits[torch.arange(30), torch.randint(0, 5000, (30,), generator=generator)] += sure
    weights, masks = logits.softmax(1), torch.rand(30, 20, 20, generator=generator) ** 4
    with FlopCounterMode(display=False) as counter:
        found = most_probable_class(chunks(weights), masks)
    assert torch.equal(found, torch.einsum("qk,qhw->khw", weights, masks).argmax(0))
    return counter.get_total_flops() / (2 * 30 * 5000 * 400)


def test_a_model_that_is_sure_needs_few_of_the_scores_and_one_that_is_not_all() -> None:
    assert _flops(14.0) < 0.06 and _flops(0.0) == 1.0


def test_values_that_are_not_finite_hide_no_class_that_is() -> None:
    """A query of NaN makes NaN of its pixels; the other pixels have their class."""
    weights = torch.rand(2, 600, generator=torch.Generator().manual_seed(1))
    masks = torch.tensor([[[0.5, 0.5, float("nan")]], [[0.1, 0.0, 0.2]]])
    found = most_probable_class(chunks(weights), masks)
    assert torch.equal(found[0, :2], torch.einsum("qk,qhw->khw", weights, masks).argmax(0)[0, :2])
